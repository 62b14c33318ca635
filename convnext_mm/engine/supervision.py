"""What a process tells the launcher that started it, through files in a folder, and
how it ends with it."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError

from convnext_mm.checkpoint.write import write_text

FOLDER = 'CONVNEXT_MM_LAUNCH'  # environment variable
LAUNCHER = 'launcher'  # in the launcher's folder: its process id
STARTED = '.started_by'  # in a work folder
STALLED = 76  # exit status of a process that waited in vain for another
ORPHAN_GRACE = 60  # seconds for the last save of a process without a launcher
# What PyTorch says, as a plain RuntimeError, about faults from outside.
OUTSIDE = (
    'CUDA error',
    'NCCL error',
    'Connection',
    'connection',
    'DataLoader worker',
    'Timed out',  # gloo, which waited for another process
    'timeout',
)


def folder() -> Path | None:
    """The launcher's folder; None without one."""
    path = os.environ.get(FOLDER)
    return Path(path) if path else None


def rank() -> int:
    """This process's number, also before processes know of each other."""
    return int(os.environ.get('RANK', '0'))


def _starters() -> dict[str, int]:
    """Slurm and torchrun, where they started this process: by names that stay when
    they start it again, how often they did."""
    env = os.environ
    agent = f'{env.get("TORCHELASTIC_RUN_ID")} {socket.gethostname()} {os.getppid()}'
    counts = {
        f'Slurm job {env.get("SLURM_JOB_ID")}': 'SLURM_RESTART_COUNT',
        f'torchrun {agent}': 'TORCHELASTIC_RESTART_COUNT',
    }
    return {name: int(env.get(count) or 0) for name, count in counts.items()}


def is_restart(work_dir: str) -> bool:
    """Whether this run was started in that folder before, by our launcher, torchrun
    or Slurm. One that was started, and refused the folder, was not."""
    path, started = folder(), Path(work_dir, STARTED)
    if path is not None and (path / 'started').exists():
        return True
    known = started.read_text().splitlines() if started.is_file() else []
    return any(count and name in known for name, count in _starters().items())


def mark_started(work_dir: str) -> None:
    """From now on a new start in that folder is a restart."""
    path = folder()
    if path is not None:
        (path / 'started').touch()
    if rank() == 0:
        with contextlib.suppress(OSError):  # a full disk, which a save will name
            write_text(Path(work_dir, STARTED), '\n'.join(_starters()) + '\n')


def announce() -> None:
    """Tells the launcher about this process, which ends when the launcher does."""
    path = folder()
    if path is not None:
        # It may have ended while this process was starting.
        launcher = int((path / LAUNCHER).read_text())
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()
        (path / f'{rank()}.pid').write_text(str(os.getpid()))


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
        # Where there is no room, the launcher has the exit status alone.
        with contextlib.suppress(OSError):
            write_text(path / f'{rank()}.json', json.dumps(content))


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
