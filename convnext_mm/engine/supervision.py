"""What a process tells the launcher that started it, through files in a folder, and
how it ends with it."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

FOLDER = 'CONVNEXT_MM_LAUNCH'  # environment variables
ATTEMPT = 'CONVNEXT_MM_ATTEMPT'
STALLED = 76  # exit status of a process that waited in vain for another
ORPHAN_GRACE = 60  # seconds for the last save of a process without a launcher
# What PyTorch says, as a plain RuntimeError, about faults from outside.
OUTSIDE = ('CUDA error', 'NCCL error', 'Connection', 'connection', 'DataLoader worker')


def folder() -> Path | None:
    """The launcher's folder; None without one."""
    path = os.environ.get(FOLDER)
    return Path(path) if path else None


def rank() -> int:
    """This process's number, also before processes know of each other."""
    return int(os.environ.get('RANK', '0'))


def is_restart() -> bool:
    """Whether this run was started before, by our launcher, torchrun or Slurm."""
    names = (ATTEMPT, 'TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT')
    path = folder()
    return any(int(os.environ.get(name) or 0) for name in names) or (
        path is not None and (path / 'started').exists()
    )


def mark_started() -> None:
    """From now on a new start is a restart."""
    path = folder()
    if path is not None:
        (path / 'started').touch()


def announce() -> None:
    """Tells the launcher about this process, which ends when the launcher does."""
    path = folder()
    if path is not None:
        (path / f'{rank()}.pid').write_text(str(os.getpid()))
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # saves, if it can
    time.sleep(ORPHAN_GRACE)
    os._exit(1)


def note_work_dir(work_dir: str) -> None:
    """Where the launcher's log is to be."""
    path = folder()
    if path is not None:
        (path / 'work_dir').write_text(os.path.abspath(work_dir))


def report(message: str, mendable: bool) -> None:
    """Tells the launcher why this process ends.

    Args:
        message: One sentence.
        mendable: Whether the same again may go well.
    """
    path = folder()
    if path is not None:
        content = dict(
            message=message, mendable=mendable, time=time.time(), rank=rank()
        )
        partial = path / f'{rank()}.partial'
        partial.write_text(json.dumps(content))
        partial.replace(path / f'{rank()}.json')


def is_mendable(error: BaseException) -> bool:
    """Whether the fault came from outside: another process, a device, the system."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    return isinstance(error, (DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUTSIDE)
    )


def read_reports(path: Path) -> list[dict[str, Any]]:
    """Of all processes, in the order in which they ended."""
    reports = [json.loads(p.read_text()) for p in path.glob('*.json')]
    return sorted(reports, key=lambda report: report['time'])
