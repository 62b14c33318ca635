"""Reads checkpoint files without running anything they hold.

Two formats: safetensors, and what ``torch.save`` writes (a zip archive, or
before torch 1.6 a row of pickles). A pickle passes two gates:
:mod:`.pickle_scan` decides whether it may be read, then
``torch.load(weights_only=True)`` reads it.
"""
import json
import mmap as memory_map
import os
import stat
import struct
import zipfile
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import (CheckpointError, CheckpointFileError,
                     UnsafeCheckpointError)
from .pickle_scan import HISTORY_BUFFER, StorageSizes, scan_pickle

# Files whose pickles the user vouches for, separated as in PATH.
TRUST_VARIABLE = 'CONVNEXT_MM_TRUST_PICKLE'
# Older loaders have known ways around weights_only (CVE-2025-32434 and later).
SAFE_TORCH = (2, 10)

MAX_HEADER = 16 << 20  # of safetensors; an xlarge model's has 50 kB
CHUNK = 8 << 20
LEGACY_MAGIC = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'
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


class _ReadHistoryBuffer(HistoryBuffer):
    """Becomes a HistoryBuffer with the stored values and MMEngine's own
    statistics methods: those in the file would replace them for every buffer.
    """

    def __setstate__(self, state: dict) -> None:
        self.__class__ = HistoryBuffer
        self.max_length = int(state['max_length'])
        for name in ('_log_history', '_count_history'):
            if not isinstance(state[name], np.ndarray):
                raise ValueError(f'a history buffer whose {name} is not an '
                                 'array')
            setattr(self, name, state[name])
        self._set_default_statistics()


def _history_method(cls: type, name: str) -> str:
    """Stands in for the ``getattr`` with which MMEngine's checkpoints name the
    methods of a history buffer; they are not used."""
    return name


def _inert_types() -> List[Any]:
    """What a checkpoint of a training run holds beyond torch's own list."""
    dtypes = {type(np.dtype(code)) for code in np.typecodes['AllFloat'] +
              np.typecodes['AllInteger'] + '?'}
    core = np.array(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        Namespace, np.ndarray, np.dtype, *dtypes, (bytes, 'builtins.bytes'),
        (_history_method, 'builtins.getattr'),
        (_ReadHistoryBuffer, HISTORY_BUFFER),
        *((function, f'numpy.{package}.multiarray.{name}')
          for package in ('core', '_core')
          for function, name in ((core, '_reconstruct'), (scalar, 'scalar')))
    ]


@contextmanager
def _only_inert_types() -> Iterator[None]:
    """Makes torch's list of safe globals exactly ours for a while: what other
    libraries added (some add getattr) does not count here."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_inert_types())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_checkpoint(path: Union[str, os.PathLike],
                    mmap: bool = True,
                    trust_pickle: bool = False) -> Dict[str, Any]:
    """Reads a checkpoint file into CPU memory, executing nothing.

    Args:
        path: A file in safetensors format or written by ``torch.save``.
        mmap: Map tensors from the file where its format allows, instead of
            copying them. The file must not be overwritten while they are used.
        trust_pickle: Vouch for the file: whatever its pickle holds is executed.
            For files you made yourself. ``CONVNEXT_MM_TRUST_PICKLE`` with the
            file's path does the same.

    Returns:
        The dictionary in the file; tensors lie on the CPU.

    Raises:
        CheckpointFileError: No such file, not a checkpoint, or damaged.
        UnsafeCheckpointError: Its pickle holds more than tensors, plain
            containers, ``argparse.Namespace``, NumPy numbers and MMEngine's
            history buffers; or torch is too old to read pickles safely.
    """
    path = Path(path).expanduser()
    try:
        content = _read(path, mmap, trust_pickle or _is_vouched_for(path))
    except CheckpointError as error:
        raise type(error)(f'{path}: {error}') from error
    if not isinstance(content, dict):
        raise CheckpointFileError(
            f'{path}: holds a {type(content).__name__}; a checkpoint is a '
            'dictionary of weights')
    return content


def check_format(path: Path) -> str:
    """``'zip'``, ``'legacy'`` or ``'safetensors'``, from the content.

    Raises:
        CheckpointFileError: It is none of them; the message says what it is.
    """
    with _open(path) as file:
        head = file.read(4096)
        size = os.fstat(file.fileno()).st_size
    if not head:
        raise CheckpointFileError('the file is empty')
    if head.startswith(b'PK\x03\x04'):
        return 'zip'
    if head.startswith(LEGACY_MAGIC):
        return 'legacy'
    if len(head) > 8 and head[8:9] == b'{' and struct.unpack(
            '<Q', head[:8])[0] <= min(MAX_HEADER, size - 8):
        return 'safetensors'
    text = head.lstrip().lower()
    if text.startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        raise CheckpointFileError(
            'is a web page, not weights: the address leads to a page or to '
            'an error message; use the direct download link')
    if head[257:262] == b'ustar':
        raise CheckpointFileError('is a tar archive (or from torch before '
                                  '0.4); unpack or re-save it first')
    for magic, kind in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise CheckpointFileError(f'is {kind}, not a checkpoint')
    raise CheckpointFileError(
        'is neither a file of torch.save nor safetensors; the download may '
        'have been cut or changed')


def _open(path: Path):
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):  # opening a pipe would wait for ever
            return open(path, 'rb')
    except FileNotFoundError as error:
        raise CheckpointFileError('there is no such file') from error
    except PermissionError as error:
        raise CheckpointFileError(
            'may not be read: check its permissions (chmod +r)') from error
    except (OSError, ValueError) as error:
        raise CheckpointFileError(f'cannot be opened: {error}') from error
    if stat.S_ISDIR(mode):
        raise CheckpointFileError(
            'is a directory; give the checkpoint file in it')
    raise CheckpointFileError('is not a regular file')


def _is_vouched_for(path: Path) -> bool:
    vouched = os.environ.get(TRUST_VARIABLE, '')
    return any(
        os.path.realpath(os.path.expanduser(entry)) == os.path.realpath(path)
        for entry in vouched.split(os.pathsep) if entry)


def _read(path: Path, mmap: bool, trusted: bool) -> Any:
    kind = check_format(path)
    if kind == 'safetensors':
        return _read_safetensors(path, mmap)
    if trusted:
        return _torch_load(path, weights_only=False)
    if torch.torch_version.TorchVersion(torch.__version__) < SAFE_TORCH:
        raise UnsafeCheckpointError(
            f'is a pickle, and torch {torch.__version__} cannot read pickles '
            'safely (CVE-2025-32434): use torch 2.10 or later, a .safetensors '
            f'file, or, if you made the file yourself, set {TRUST_VARIABLE} '
            'to its path')
    try:
        with _open(path) as file:
            (_check_archive if kind == 'zip' else _check_legacy)(file)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f'{error}. If you made the file yourself, set {TRUST_VARIABLE} to '
            'its path to run it all the same') from error
    with _only_inert_types():
        return _torch_load(
            path, weights_only=True, mmap=mmap and kind == 'zip')


def _torch_load(path: Path, **options: Any) -> Any:
    # torch raises errors of many types on damaged files, and a vouched-for
    # pickle may raise anything.
    try:
        return torch.load(path, map_location='cpu', **options)
    except Exception as error:
        raise CheckpointFileError(
            'cannot be read; it is damaged or from an unsupported version of '
            f'torch ({type(error).__name__}: {_first_line(error)})'
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [''])[0][:200]


def _check_archive(file) -> None:
    """Checks the zip archive of torch.save: its index, its checksums, its
    pickle."""
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            entries = _check_index(archive, size)
            _check_sums(archive)
            data = archive.read(entries['data.pkl'])
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, KeyError,
            IndexError, UnicodeError, OverflowError, struct.error,
            zipfile.LargeZipFile) as error:
        raise CheckpointFileError(
            'the archive is truncated or damaged; download or copy it again '
            f'({_first_line(error)})') from error
    sizes = {
        name[len('data/'):]: entry.file_size
        for name, entry in entries.items() if name.startswith('data/')
    }
    scan_pickle(data, StorageSizes(sizes, size))


def _check_index(archive: zipfile.ZipFile,
                 size: int) -> Dict[str, zipfile.ZipInfo]:
    """The archive's entries by name without the folder they all lie in."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
           for info in infos):
        raise CheckpointFileError(
            'the archive is compressed or encrypted, which torch.save never '
            'does (a small file could expand without bound); unpack it first')
    if sum(info.file_size for info in infos) > size:
        raise CheckpointFileError(
            'the archive declares more bytes than the file has')
    entries = {info.filename.partition('/')[2]: info for info in infos}
    folders = {info.filename.partition('/')[0] for info in infos}
    if len(entries) < len(infos) or len(folders) > 1:
        raise CheckpointFileError('the archive holds a name twice or more '
                                  'than one folder; it is damaged')
    if 'constants.pkl' in entries:
        raise UnsafeCheckpointError(
            'the file is a TorchScript program, not weights: load it with '
            'torch.jit.load where you trust it and save its state_dict()')
    if 'data.pkl' not in entries:
        raise CheckpointFileError(
            'the archive was not written by torch.save (no data.pkl)')
    # So that every reader of zip files finds the same index in it.
    if archive.comment or min(info.header_offset for info in infos):
        raise CheckpointFileError('the archive has bytes before or after it')
    return entries


def _check_sums(archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if not any(info.CRC for info in infos):
        # Written with torch.serialization.set_crc32_options(False).
        for info in infos:
            info.CRC = None
        return
    for info in infos:
        with archive.open(info) as entry:
            while entry.read(CHUNK):  # checks the sum when it reaches the end
                pass


def _check_legacy(file) -> None:
    """Checks the row of pickles that torch before 1.6 wrote."""
    size = os.fstat(file.fileno()).st_size
    with memory_map.mmap(
            file.fileno(), 0, access=memory_map.ACCESS_READ) as data:
        storages = StorageSizes(None, size)
        position = 0
        for _ in range(5):  # magic, version, system, content, storage keys
            position = scan_pickle(data, storages, position)


def _read_safetensors(path: Path, mmap: bool) -> Dict[str, Tensor]:
    with _open(path) as file:
        length = struct.unpack('<Q', file.read(8))[0]
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointFileError(
            f'the header is damaged ({_first_line(error)})') from error
    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError,
            AttributeError, KeyError) as error:
        raise CheckpointFileError(
            'is a truncated or damaged safetensors file; download or copy it '
            f'again ({_first_line(error)})') from error
    if not mmap:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise CheckpointFileError(f'holds the key {double!r} twice')
    return content
