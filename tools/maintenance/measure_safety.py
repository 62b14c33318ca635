"""Measures what the safety of a run costs on this machine, and writes
benchmarks/safety.json: the share of a step that each part takes, and how much
slower steps are while a checkpoint is written."""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from convnext_mm.analysis.machine import machine
from convnext_mm.apis.train import prepare
from convnext_mm.datasets import write_shapes
from convnext_mm.engine import loops, positions
from convnext_mm.engine.hooks import CheckpointHook, NonFiniteHook, non_finite_hook
from convnext_mm.engine.launch import running

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    (loops, 'seed_step', 'generators of a step'),
    (positions, 'seed_generators', 'generators, of samples as well'),
    (non_finite_hook, 'gradient_norm', 'norm of the gradients'),
    (NonFiniteHook, 'before_train_iter', 'copy of batch norm statistics'),
    (NonFiniteHook, 'after_train_iter', 'look at losses'),
    (CheckpointHook, 'after_train_iter', 'agreement on checkpoints and signals'),
)


def measure(steps: int, batch: int, arch: str) -> dict[str, Any]:
    """Shares of the time of all steps; medians of steps with and without a write."""
    spent: dict[str, float] = defaultdict(float)
    for owner, name, what in PARTS:
        setattr(owner, name, timed(getattr(owner, name), what, spent))
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(f'{folder}/data', 16, 2, 192)
        cfg = prepare(
            str(ROOT / 'configs/demo/upernet_convnext-atto_shapes.py'),
            work_dir=f'{folder}/work',
            data_root=f'{folder}/data',
            cfg_options={
                'model.backbone.arch': arch,
                'train_cfg.max_iters': steps,
                'train_cfg.val_interval': sys.maxsize,
                'train_dataloader.batch_size': batch,
                'train_dataloader.num_workers': 0,
                'train_dataloader.persistent_workers': False,
                'default_hooks.checkpoint.interval': sys.maxsize,
                'default_hooks.checkpoint.save_last': False,
                # Else clipping has the norm that the guard would compute.
                'optim_wrapper.clip_grad': None,
            },
        )
        clock = Clock(every=8)
        with running(cfg) as runner:
            runner.register_hook(clock, 'LOWEST')
            runner.train()
    quiet, writing = (
        statistics.median(t for t, busy in clock.steps[4:] if busy is b)
        for b in (False, True)
    )
    total = sum(t for t, _ in clock.steps)
    return dict(
        steps=steps,
        step_seconds=quiet,
        shares={what: seconds / total for what, seconds in spent.items()},
        ratio_while_writing=writing / quiet,
        writes=clock.writes,
        checkpoint_megabytes=clock.megabytes,
    )


def timed(function: Callable, what: str, spent: dict[str, float]) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - start

    return wrapper


class Clock(Hook):
    """Times steps, and asks for a checkpoint every so many."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.start, self.busy = 0.0, False
        self.steps: list[tuple[float, bool]] = []  # seconds, whether one is written
        self.writes, self.megabytes = 0, 0.0

    def after_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        if self.start:
            self.steps.append((now - self.start, self.busy))
        self.start, self.busy = now, runner.writer.busy
        if runner.iter % self.every == self.every - 1:
            path = Path(runner.work_dir, 'timed.pth')
            if path.exists():
                self.megabytes = path.stat().st_size / 2**20
            # In the time of the next step, which also waits for the copy.
            runner.save_checkpoint(runner.work_dir, path.name, by_epoch=False)
            self.busy = True
            self.writes += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', type=int, default=48)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--arch', default='atto')
    args = parser.parse_args()
    torch.manual_seed(0)
    result = dict(
        command='python tools/maintenance/measure_safety.py '
        f'--steps {args.steps} --batch {args.batch} --arch {args.arch}',
        machine=machine(),
        **measure(args.steps, args.batch, args.arch),
    )
    path = ROOT / 'benchmarks' / 'safety.json'
    path.write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
