"""The folder of a run: whose it is, which checkpoints it holds, and which of them
to go on from."""

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log

from convnext_mm.checkpoint import CheckpointError, CheckpointFileError, read_checkpoint
from convnext_mm.checkpoint.errors import shown
from convnext_mm.checkpoint.write import PARTIAL

from .errors import ConfigError, WorkFolderError

LOCK = '.lock'
POINTER = 'last_checkpoint'  # names the newest checkpoint, for MMEngine
INTERRUPTED = 'interrupted'  # a signal ended the last run
VALIDATED = 'last_validation'  # after which iteration
AUTOSAVE = 'autosave_'
# How MMEngine's CheckpointHook names files, and how ours names those between.
NAME = re.compile(rf'(?:{AUTOSAVE})?(?:epoch_(\d+))?(?:_?iter_(\d+))?\.pth')


def progress(path: Path) -> tuple[int, int] | None:
    """Epochs and iterations that a checkpoint's name tells; None where it tells
    none."""
    match = NAME.fullmatch(path.name)
    if match is None or match.group(1, 2) == (None, None):
        return None
    return int(match[1] or 0), int(match[2] or 0)


def checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints to resume from in a folder, newest first."""
    found = [(done, p) for p in Path(folder).glob('*.pth') if (done := progress(p))]
    return [path for _, path in sorted(found, reverse=True)]


def pointed_at(work_dir: str | os.PathLike) -> str | None:
    """The checkpoint that the pointer of a work folder names, for those that lie
    elsewhere or have other names."""
    pointer = Path(work_dir, POINTER)
    name = pointer.read_text().strip() if pointer.is_file() else ''
    return os.path.join(work_dir, name) if name and '://' not in name else name or None


def resumable(
    folder: str | os.PathLike, work_dir: str | os.PathLike | None = None
) -> list[Path]:
    """The checkpoints to resume from, newest first. One with a name of the user's
    own is known by the pointer alone.

    Args:
        folder: Of the checkpoints.
        work_dir: Of the pointer; by default the same.
    """
    found = checkpoints(folder)
    path = Path(pointed_at(work_dir or folder) or '')
    if path.is_file() and progress(path) is None:
        found.insert(0, path)
    return found


def newest_valid(
    folder: str | os.PathLike, work_dir: str | os.PathLike | None = None
) -> Path | None:
    """The newest checkpoint that can be read, the same on every process; None
    where there is none at all.

    Args:
        folder, work_dir: Of :func:`resumable`.

    Raises:
        CheckpointFileError: There are some, and none can be read.
    """
    answer: list = [None, None]
    if is_main_process():
        try:
            answer[0] = _newest_valid(resumable(folder, work_dir), folder)
        except CheckpointError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    path, problem = answer
    if problem is not None:
        raise CheckpointFileError(problem)
    return path


def _newest_valid(found: list[Path], folder: str | os.PathLike) -> Path | None:
    problems = []
    for path in found:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            print_log(f'Skipped a checkpoint: {shown(error, 500)}', 'current')
        else:
            return path
    if found:
        raise CheckpointFileError(
            f'{folder}: of {len(found)} checkpoints none can be read '
            f'({"; ".join(problems)}): bring one back, or train anew with another '
            '--work-dir or --overwrite'
        )
    return None


def check_unused(
    folder: str | os.PathLike, work_dir: str | os.PathLike | None = None
) -> None:
    """Before a run that starts from the beginning.

    Args:
        folder, work_dir: Of :func:`resumable`.

    Raises:
        WorkFolderError: The folder holds checkpoints.
    """
    found = resumable(folder, work_dir)
    if found:
        raise WorkFolderError(
            f'{folder} holds checkpoints of a run, the last is {found[0].name}: go on '
            'with --resume, take another --work-dir, or delete them with --overwrite'
        )


def check_newest(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Before a run that goes on from one of several checkpoints.

    Raises:
        WorkFolderError: The folder holds newer ones, which would mix with this run's.
    """
    path = Path(path)
    done = progress(path)
    if done is None or path.parent.resolve() != Path(folder).resolve():
        newer = checkpoints(folder)
    else:
        newer = [p for p in checkpoints(folder) if (progress(p) or done) > done]
    if newer:
        raise WorkFolderError(
            f'{folder} holds {newer[0].name}, and the run is to go on from {path}: '
            'the checkpoints of both would mix; take another --work-dir, or delete '
            'what is newer with --overwrite'
        )


def clear(
    folder: str | os.PathLike,
    work_dir: str | os.PathLike | None = None,
    keep: Path | None = None,
    needed: str | None = None,
) -> None:
    """Deletes what a run left that another one would take for its own.

    Args:
        folder, work_dir: Of :func:`resumable`.
        keep: A checkpoint; it and what is older stays.
        needed: What the run is to start from.

    Raises:
        WorkFolderError: It would be deleted.
    """
    folder = Path(folder)
    done = (
        progress(keep) if keep and keep.parent.resolve() == folder.resolve() else None
    )
    old = [
        path
        for path in resumable(folder, work_dir)
        # A copied folder's pointer may name a file of the run that it was copied from.
        if path.parent.resolve() == folder.resolve()
        and (not done or (progress(path) or done) > done)
    ]
    if not done:
        old += folder.glob('best_*.pth')
    old = [path for path in old if not keep or path.resolve() != keep.resolve()]
    if needed and Path(needed).resolve() in [path.resolve() for path in old]:
        raise WorkFolderError(
            f'load_from={needed} is in the folder whose checkpoints --overwrite '
            'deletes: move it elsewhere, or take another --work-dir'
        )
    for path in old:
        path.unlink(missing_ok=True)
    forget(work_dir or folder)
    if old:
        names = ', '.join(path.name for path in old)
        print_log(f'Deleted in {folder}: {names}.', 'current')


def forget(work_dir: str | os.PathLike) -> None:
    """Deletes what speaks of checkpoints that are gone."""
    for name in (POINTER, VALIDATED):
        Path(work_dir, name).unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """
    Raises:
        ConfigError: Nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)):
            pass
    except OSError as error:
        raise ConfigError(
            f'nothing can be written into {folder} ({error.strerror}): give a '
            '--work-dir that can be'
        ) from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of a folder. The system lets go of the lock when its
    owner ends, however that ends.

    Raises:
        WorkFolderError: Another run has it.
        ConfigError: Nothing can be written there.
    """
    import fcntl  # not on Windows

    path = Path(folder, LOCK)
    check_writable(folder)
    with open(path, 'a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise WorkFolderError(
                f'{folder} belongs to a run that is under way '
                f'({file.read().strip() or "unknown"}): wait for it, stop it, or take '
                'another --work-dir'
            ) from None
        except OSError as error:
            print_log(f'{folder} takes no locks ({error.strerror}).', 'current')
        file.truncate(0)
        file.write(
            f'process {os.getpid()} on {socket.gethostname()}, '
            f'since {time.strftime("%Y-%m-%d %H:%M:%S")}\n'
        )
        file.flush()
        Path(folder, INTERRUPTED).unlink(missing_ok=True)
        for partial in path.parent.glob(f'.*{PARTIAL}'):  # of a run that was killed
            partial.unlink(missing_ok=True)
        yield
