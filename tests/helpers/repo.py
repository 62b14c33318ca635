"""Running what the repository holds, as a user does."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch.torch_version import TorchVersion

from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]
SHAPES = 'configs/demo/mask-rcnn_convnext-atto_shapes.py'
COCO_TINY = 'configs/demo/mask-rcnn_convnext-atto_coco-tiny.py'
FEW_ITERATIONS = (
    'train_cfg.max_iters=6',
    'train_cfg.val_interval=3',
    'default_hooks.checkpoint.interval=3',
    'default_hooks.logger.interval=1',
    'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
)


def load_tool(name: str) -> ModuleType:
    """A script below ``tools/`` as a module; ``'maintenance/x'`` works too."""
    spec = importlib.util.spec_from_file_location(
        f'tool_{Path(name).name}', ROOT / 'tools' / f'{name}.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(name: str, *arguments: object) -> dict:
    """What a command of the command line makes of its arguments."""
    command = import_module(f'convnext_mm.cli.{name}').command
    params = command.make_context(name, list(map(str, arguments))).params
    del params['gpus']
    return params


def at_least(version: str) -> bool:
    """Whether PyTorch is no older than that."""
    return TorchVersion(torch.__version__) >= version


def free_port() -> int:
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def run(
    *command: object,
    port: int | None = None,
    check: bool = True,
    python: str = sys.executable,
) -> str:
    """What a command prints. ``python`` is what scripts, and the launcher of
    several processes, start."""
    env = {**os.environ, 'PYTHON': python, 'PYTHONWARNINGS': 'ignore'}
    env['PYTHON_EXEC'] = python
    # Threads that wait for each other crawl where others use the machine.
    env['OMP_NUM_THREADS'] = '1'
    if port:
        env['PORT'] = str(port)
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def tool(name: str, *arguments: object, **options) -> str:
    """What a script below ``tools/`` prints, in a warm Python."""
    return run(warm_python(), f'tools/{name}.py', *arguments, **options)


def records(work_dir: Path) -> list[dict]:
    """All logged scalars, of all runs in a work folder, in order."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]
