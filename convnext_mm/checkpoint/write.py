"""Writing checkpoints so that a fault leaves the old one or the new one."""

import os
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointWriteError

PARTIAL = '.part'  # ends the names of files that are being written
SPARE_BYTES = 2**20  # beside tensors: names, numbers, the config's text


def write_checkpoint(content: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes a checkpoint beside its place, verifies it and moves it there.

    Args:
        content: What ``torch.save`` takes.
        path: File on a local or mounted disk; it is replaced.

    Raises:
        CheckpointWriteError: The disk is full, or refuses it. What was at
            ``path`` before is there still, and no part of the new one.
    """
    path = Path(path)
    partial = path.with_name(f'.{path.name}.{os.getpid()}{PARTIAL}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = count_bytes(content) + SPARE_BYTES
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(
                f'it takes {needed / 2**20:.0f} MB, and {path.parent} has '
                f'{free / 2**20:.0f} MB free'
            )
        with open(partial, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(partial) as archive:
            if archive.testzip() is not None:
                raise OSError('what was written reads back otherwise')
        os.replace(partial, path)
        _flush_folder(path.parent)
    # PyTorch's writer turns what the disk says into a RuntimeError.
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise CheckpointWriteError(f'{path} could not be written: {error}') from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a small file as a whole."""
    partial = path.with_name(f'.{path.name}.{os.getpid()}{PARTIAL}')
    partial.write_text(text)
    os.replace(partial, path)


def _flush_folder(folder: Path) -> None:
    """A renamed file is safe from a power cut when its folder is written."""
    with suppress(OSError):  # some mounted disks have no such thing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def count_bytes(content: Any) -> int:
    """Of all tensors in dictionaries and lists."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return 0
    return sum(map(count_bytes, content))


def copy_to_cpu(content: Any) -> Any:
    """The same dictionaries and lists, with copies of the tensors on the CPU."""
    if isinstance(content, Tensor):
        return content.detach().to('cpu', copy=True)
    if isinstance(content, dict):
        copied = OrderedDict(
            (key, copy_to_cpu(value)) for key, value in content.items()
        )
        if hasattr(content, '_metadata'):  # versions of modules
            copied._metadata = content._metadata  # type: ignore[attr-defined]
        return copied if isinstance(content, OrderedDict) else dict(copied)
    if isinstance(content, (list, tuple)):
        return type(content)(map(copy_to_cpu, content))
    return content


class BackgroundWriter:
    """Writes one checkpoint after the other, while training goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        self._last: Future | None = None
        self._failure: CheckpointWriteError | None = None

    @property
    def busy(self) -> bool:
        return self._last is not None and not self._last.done()

    def write(
        self, content: dict[str, Any], path: Path, then: Callable[[], None]
    ) -> None:
        """Starts to write a copy of what may change; waits for the one before, whose
        failure :meth:`check` and :meth:`wait` raise.

        Args:
            content, path: Of :func:`write_checkpoint`.
            then: Called when the file is in its place.
        """
        try:
            self.wait()
        except CheckpointWriteError as error:
            self._failure = error
        self._last = self._thread.submit(_write, copy_to_cpu(content), path, then)

    def check(self) -> None:
        """Raises what went wrong, once, without waiting."""
        if self._failure is not None or (self._last is not None and not self.busy):
            self.wait()

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            CheckpointWriteError: It could not be.
        """
        last, self._last = self._last, None
        failure, self._failure = self._failure, None
        if last is not None:
            last.result()
        if failure is not None:
            raise failure

    def afterwards(self, action: Callable[[], None]) -> None:
        """Has the thread do it when everything is written, and not where that
        failed."""
        last = self._last

        def act() -> None:
            if last is not None:
                last.result()
            action()

        self._last = self._thread.submit(act)


def _write(content: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
    write_checkpoint(content, path)
    then()
