"""Reads checkpoint files without running anything they hold.

Two formats: safetensors, and what ``torch.save`` writes (a zip archive, or,
before torch 1.6 and in OpenMMLab's published files, a row of pickles). A file
is opened once and every byte is read once: what :mod:`.pickle_check` has looked
at is what PyTorch's ``weights_only`` unpickler then gets.
"""

import datetime
import io
import itertools
import json
import os
import stat
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from safetensors import SafetensorError

from .errors import (
    CheckpointError,
    CheckpointFileError,
    UnsafeCheckpointError,
    naming,
    shown,
)
from .pickle_check import (
    ARRAY_CALLS,
    DATES,
    HISTORY_BUFFER,
    MAPPINGS,
    ONE_CYCLE,
    ONLY_NAMED,
    PATHS,
    SCALAR_CALLS,
    check_pickle,
)

# Files whose pickles the user vouches for, separated as in PATH.
TRUST_VARIABLE = 'CONVNEXT_MM_TRUST_PICKLE'
# Older loaders have known ways around weights_only (CVE-2025-32434 and later).
SAFE_TORCH = '2.10'

CHUNK = 1 << 20
MAX_HEADER = 16 << 20  # of safetensors; an xlarge model's has 50 kB
LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
LEGACY_VERSION = 1001
# What people pass by mistake, by its first bytes.
OTHER_FORMATS = {
    b'version https://git-lfs': 'a Git LFS pointer; run `git lfs pull`',
    b'\x1f\x8b': 'a gzip archive; unpack it first',
    b'BZh': 'a bzip2 archive; unpack it first',
    b'\xfd7zXZ': 'an xz archive; unpack it first',
    b'\x28\xb5\x2f\xfd': 'a zstd archive; unpack it first',
    b'\x89HDF': 'an HDF5 file (Keras?)',
    b'\x93NUMPY': 'a NumPy array',
    b'{': 'JSON text',
    b'\x80': 'a pickle that torch.save did not write',
}
# How to write a file again that this reader does not know.
SAVE_AGAIN = (
    'save it again with a current torch: '
    'torch.save(torch.load(FILE, weights_only=True), NEW_FILE)'
)

_SAFE_GLOBALS = Lock()  # torch has one list for all threads

Reader = Callable[[BinaryIO], Any]
LoadStorage = Callable[[str, int, int], torch.UntypedStorage]
# torch does not annotate them.
new_storage: Callable[[int], torch.UntypedStorage] = torch.UntypedStorage
typed_storage: Callable[..., torch.storage.TypedStorage] = torch.storage.TypedStorage


class _ReadHistoryBuffer(HistoryBuffer):
    """Becomes a HistoryBuffer with the stored values and MMEngine's own
    statistics methods: those in the file would replace them for every buffer.
    """

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        self.max_length = int(state['max_length'])
        for name in ('_log_history', '_count_history'):
            if not isinstance(state[name], np.ndarray):
                raise ValueError(f'a history buffer whose {name} is not an array')
            setattr(self, name, state[name])
        self._set_default_statistics()


def _method(cls: type, name: str) -> str:
    """Stands in for the ``getattr`` with which MMEngine's checkpoints name
    methods of history buffers and schedulers; they are not used."""
    return name


def _read_path(*parts: str) -> str:
    """A stored ``pathlib`` path, as text."""
    return str(PurePosixPath(*parts))


def _empty_dict(*_: Any) -> dict:
    return {}


def _empty_list(*_: Any) -> list:
    return []


def _inert_types() -> list[Any]:
    """What a checkpoint of a training run holds beyond torch's own list."""
    dtypes = {
        type(np.dtype(code))
        for code in np.typecodes['AllFloat'] + np.typecodes['AllInteger'] + '?'
    }
    array = np.array(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        Namespace,
        np.ndarray,
        np.dtype,
        *dtypes,
        (bytes, 'builtins.bytes'),
        (frozenset, 'builtins.frozenset'),
        (_method, 'builtins.getattr'),
        (_ReadHistoryBuffer, HISTORY_BUFFER),
        (_empty_dict, 'collections.defaultdict'),
        (_empty_list, 'collections.deque'),
        *((dict, name) for name in MAPPINGS),
        *((_read_path, name) for name in PATHS),
        *((_empty_dict, name) for name in (ONE_CYCLE, *ONLY_NAMED)),
        *(getattr(datetime, name.partition('.')[2]) for name in DATES),
        *((array, name) for name in ARRAY_CALLS),
        *((scalar, name) for name in SCALAR_CALLS),
    ]


@contextmanager
def _only_inert_types() -> Iterator[None]:
    """Makes torch's list of safe globals exactly ours for a while: what other
    libraries added (some add getattr) does not count here."""
    with _SAFE_GLOBALS:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(_inert_types())
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def read_checkpoint(
    path: str | os.PathLike, trust_pickle: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint file into CPU memory, executing nothing.

    Args:
        path: A file in safetensors format or written by ``torch.save``.
        trust_pickle: Vouch for the file: whatever its pickle holds is executed.
            For files you made yourself. ``CONVNEXT_MM_TRUST_PICKLE`` with the
            file's path does the same.

    Returns:
        The dictionary in the file; tensors lie in CPU memory of their own,
        stored paths are text.

    Raises:
        CheckpointFileError: No such file, not a checkpoint, or damaged.
        UnsafeCheckpointError: Its pickle asks for more than tensors, plain
            containers, dates, paths, ``argparse.Namespace``, NumPy numbers and
            MMEngine's history buffers; or torch is too old to read pickles
            safely.
    """
    place = expanded(path)
    with naming(path):
        with _open(place) as file:
            content = _read(file, trust_pickle or _is_vouched_for(place))
        if not isinstance(content, dict):
            raise CheckpointFileError(
                f'holds a {type(content).__name__}; a checkpoint is a '
                'dictionary of weights'
            )
    return content


def check_format(path: str | os.PathLike) -> None:
    """Looks at the first bytes of a file.

    Raises:
        CheckpointFileError: There is no such file, or it has none of the
            formats of checkpoints; the message says what it is.
    """
    place = expanded(path)
    with naming(path), _open(place) as file:
        _find_reader(file)


def expanded(path: str | os.PathLike, advice: str = 'write the full path') -> Path:
    """The path with the user's home folder for ``~``.

    Raises:
        CheckpointFileError: There is none; ``advice`` says what to do.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointFileError(
            f'{shown(path)}: its ~ names no home folder; {advice}'
        ) from error


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        # Opening a pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CheckpointFileError('there is no such file') from error
    except PermissionError as error:
        raise CheckpointFileError(
            'may not be read: check its permissions (chmod +r)'
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointFileError(f'cannot be opened: {shown(error)}') from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointFileError(
            'is a directory; give the checkpoint file in it'
            if stat.S_ISDIR(mode)
            else 'is not a regular file'
        )
    with open(descriptor, 'rb') as file:
        yield file


def _is_vouched_for(path: Path) -> bool:
    vouched = os.environ.get(TRUST_VARIABLE, '')
    return any(
        os.path.realpath(os.path.expanduser(entry)) == os.path.realpath(path)
        for entry in vouched.split(os.pathsep)
        if entry
    )


def _find_reader(file: BinaryIO) -> Reader:
    head = file.read(4096)
    file.seek(0)
    if not head:
        raise CheckpointFileError('the file is empty')
    if head.startswith(b'PK\x03\x04'):
        return _read_archive
    if head.startswith(LEGACY_MAGIC):
        return _read_legacy
    if (
        len(head) > 8
        and head[8:9] == b'{'
        and struct.unpack('<Q', head[:8])[0] <= min(MAX_HEADER, _size(file) - 8)
    ):
        return _read_safetensors
    text = head.lstrip().lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise CheckpointFileError(
            'is a web page, not weights: the address leads to a page or to '
            'an error message; use the direct download link'
        )
    if head[257:262] == b'ustar':
        raise CheckpointFileError(
            'is a tar archive (or from torch before 0.4); unpack or re-save it first'
        )
    for magic, kind in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise CheckpointFileError(f'is not a checkpoint but {kind}')
    raise CheckpointFileError(
        'is neither a file of torch.save nor safetensors; the download may '
        'have been cut or changed'
    )


def _read(file: BinaryIO, trusted: bool) -> Any:
    reader = _find_reader(file)
    is_pickle = reader is not _read_safetensors
    if is_pickle and trusted:
        reader = _read_trusted
    elif is_pickle and torch.torch_version.TorchVersion(torch.__version__) < SAFE_TORCH:
        raise UnsafeCheckpointError(
            f'is a pickle, and torch {torch.__version__} cannot read pickles '
            f'safely (CVE-2025-32434): use torch {SAFE_TORCH} or later, a .safetensors '
            f'file, or, if you made the file yourself, set {TRUST_VARIABLE} '
            'to its path'
        )
    try:
        return reader(file)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f'{error}. If you made the file yourself, set {TRUST_VARIABLE} to '
            'its path to run it all the same'
        ) from error
    except CheckpointError:
        raise
    # Damaged files raise errors of many types, and a vouched-for pickle may
    # raise anything.
    except Exception as error:
        reason = (str(error).splitlines() or [''])[0]
        raise CheckpointFileError(
            'cannot be read; it is truncated, damaged or from an unsupported '
            'version of torch: download or copy it again '
            f'({type(error).__name__}: {shown(reason)})'
        ) from error


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _read_trusted(file: BinaryIO) -> Any:
    return torch.load(file, map_location='cpu', weights_only=False)


def _unpickle(data: bytes, load_storage: LoadStorage) -> Any:
    """Hands a checked pickle to torch's ``weights_only`` unpickler.

    Args:
        data: Starts with the pickle.
        load_storage: Gives key, elements and bytes of an element their memory.
    """
    # What torch.load(weights_only=True) calls. That function itself looks the
    # records of an archive up in its own way, whatever was checked before, and
    # gives storages without data the memory as it happens to be.
    try:
        unpickler = import_module('torch._weights_only_unpickler').Unpickler(
            io.BytesIO(data), encoding='utf-8'
        )
    except (ImportError, AttributeError) as error:
        raise UnsafeCheckpointError(
            f'is a pickle, and in torch {torch.__version__} this reader does '
            'not find the unpickler of weights_only=True: use a .safetensors '
            'file, or the version of torch that this project proves'
        ) from error
    storages: dict[str, torch.UntypedStorage] = {}
    sizes: dict[str, int] = {}

    def load(pid: tuple) -> torch.storage.TypedStorage:
        _, storage_type, key, _, num_elements, *_ = pid
        dtype = (
            torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        )
        if key not in storages:
            storages[key] = load_storage(key, num_elements, dtype.itemsize)
            sizes[key] = storages[key].nbytes()
        if sizes[key] != num_elements * dtype.itemsize:
            raise CheckpointFileError(
                f'declares storage {shown(key)} with two sizes: it is damaged'
            )
        return typed_storage(wrap_storage=storages[key], dtype=dtype, _internal=True)

    unpickler.persistent_load = load
    with _only_inert_types():
        content = unpickler.load()
    # torch enlarges the storage of a tensor that reaches beyond it.
    if any(storage.nbytes() > sizes[key] for key, storage in storages.items()):
        raise CheckpointFileError(
            'declares a tensor that reaches beyond its storage: it is damaged '
            'or made to exhaust memory'
        )
    return content


def _fill(storage: torch.UntypedStorage, file: IO[bytes]) -> None:
    """Reads the bytes of a storage."""
    memory = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
    # Chunks that stay in the processor's cache.
    for start in range(0, len(memory), CHUNK):
        place = memory[start : start + CHUNK]
        chunk = file.read(len(place))
        if len(chunk) < len(place):
            raise CheckpointFileError('it is truncated')
        place[:] = chunk


def _read_archive(file: BinaryIO) -> Any:
    """The zip archive of torch.save."""
    with zipfile.ZipFile(file) as archive:
        records = _list_records(archive, _size(file))
        if records.get('byteorder') and archive.read(records['byteorder']) != b'little':
            raise CheckpointFileError(
                f'its numbers are not little-endian; {SAVE_AGAIN}'
            )
        data = archive.read(records['data.pkl'])
        check_pickle(data)

        def load_storage(
            key: str, num_elements: int, item_size: int
        ) -> torch.UntypedStorage:
            record = records.get(f'data/{key}')
            if record is None or record.file_size != num_elements * item_size:
                raise _missing_bytes(key, num_elements * item_size)
            storage = new_storage(record.file_size)
            with archive.open(record) as content:
                _fill(storage, content)
                content.read()  # at its end the checksum is looked at
            return storage

        return _unpickle(data, load_storage)


def _list_records(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by name without the folder they all lie in."""
    infos = archive.infolist()
    if any(
        info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos
    ):
        raise CheckpointFileError(
            'the archive is compressed or encrypted, which torch.save never '
            'does (a small file could expand without bound); unpack it first'
        )
    if sum(info.file_size for info in infos) > size:
        raise CheckpointFileError('the archive declares more bytes than the file has')
    records = {info.filename.partition('/')[2]: info for info in infos}
    folders = {info.filename.partition('/')[0] for info in infos}
    if len(records) < len(infos) or len(folders) > 1:
        raise CheckpointFileError(
            'the archive holds a name twice or more than one folder; it is damaged'
        )
    if 'constants.pkl' in records:
        raise UnsafeCheckpointError(
            'the file is a TorchScript program, not weights: load it with '
            'torch.jit.load where you trust it and save its state_dict()'
        )
    if 'data.pkl' not in records:
        raise CheckpointFileError(
            'the archive was not written by torch.save (no data.pkl)'
        )
    if not any(info.CRC for info in infos):
        # Written with torch.serialization.set_crc32_options(False). With None
        # zipfile compares nothing, of which its annotations do not know.
        unchecked: Iterable[Any] = infos
        for info in unchecked:
            info.CRC = None
    return records


def _read_legacy(file: BinaryIO) -> Any:
    """The row of pickles that torch before 1.6 wrote: magic number, version,
    system, content, keys of the storages; then the storages."""
    data = file.read()
    starts = [0]
    for _ in range(5):
        starts.append(check_pickle(data, starts[-1]))
    storages: dict[str, torch.UntypedStorage] = {}
    sizes: dict[str, int] = {}
    left = len(data)

    def load_storage(
        key: str, num_elements: int, item_size: int
    ) -> torch.UntypedStorage:
        nonlocal left
        if key in storages:
            raise CheckpointFileError(
                f'describes storage {shown(key)} outside its content: it is damaged'
            )
        left -= num_elements * item_size
        if left < 0:
            raise _missing_bytes(key, num_elements * item_size)
        sizes[key] = num_elements
        storages[key] = new_storage(num_elements * item_size)
        return storages[key]

    version, system, content, keys = (
        _unpickle(data[start:end], load_storage)
        for start, end in itertools.pairwise(starts[1:])
    )
    if version != LEGACY_VERSION or system.get('little_endian') is not True:
        raise CheckpointFileError(
            'is from a version of torch that this reader does not know, or '
            f'from a big-endian machine; {SAVE_AGAIN}'
        )
    if sorted(keys) != sorted(storages):
        raise CheckpointFileError(
            'does not list the storages of its tensors: it is damaged'
        )
    stream = io.BytesIO(data)
    stream.seek(starts[5])
    for key in keys:
        if struct.unpack('<q', stream.read(8))[0] != sizes[key]:
            raise CheckpointFileError(
                f'holds storage {shown(key)} in another size than declared: it '
                'is damaged'
            )
        _fill(storages[key], stream)
    return content


def _missing_bytes(key: str, num_bytes: int) -> CheckpointFileError:
    return CheckpointFileError(
        f'declares {num_bytes} bytes for storage {shown(key)}, which the file '
        'does not have: it is truncated, damaged or made to exhaust memory'
    )


def _read_safetensors(file: BinaryIO) -> dict[str, torch.Tensor]:
    data = file.read()
    length = struct.unpack('<Q', data[:8])[0]
    json.loads(data[8 : 8 + length], object_pairs_hook=_unique)
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointFileError(
            'is a truncated or damaged safetensors file; download or copy it '
            f'again ({shown(error)})'
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise CheckpointFileError(f'holds the key {shown(name)} twice')
        content[name] = value
    return content
