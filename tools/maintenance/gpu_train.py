"""Trains a detector and a segmentor from scratch on real images in mixed
precision, each once with this package's backbone and once with mmpretrain's:
the same initial weights, seed and batches. Writes training.json (loss curves,
metrics, images per second, peak memory, machine) and training.png to OUT. Ends
with status 1 where a run did not finish or the final losses are too far apart.
"""

import argparse
import gc
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import set_random_seed
from torch import Tensor

from compare_training import plot
from convnext_mm.analysis.machine import machine, versions
from convnext_mm.apis.benchmark.models import build_models, with_mmpretrain
from convnext_mm.apis.benchmark.networks import one_line
from convnext_mm.apis.config import load_config
from convnext_mm.checkpoint.write import write_text
from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.launch import fit_to_device, running

ROOT = Path(__file__).resolve().parents[2]
SMOKE_STEPS = 4
WARM_UP_SHARE = 4  # of this many parts of the steps the first warms up
LIMIT_S = 110  # four such runs, their evaluation and start fit into 9 minutes


class Task(NamedTuple):
    """What is trained, and on what."""

    folder: str  # of its data, below --data
    config: str
    smoke_config: str  # small enough for a CPU, on the same data
    drawn_config: str  # the same on drawn shapes
    metrics: tuple
    judged_on: str


TASKS = {
    'detector': Task(
        'coco_tiny',
        'configs/demo/mask-rcnn_convnext-t_coco-tiny.py',
        'configs/demo/mask-rcnn_convnext-atto_coco-tiny.py',
        'configs/demo/mask-rcnn_convnext-atto_shapes.py',
        ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50'),
        'its training images',
    ),
    'segmentor': Task(
        'camvid',
        'configs/demo/upernet_convnext-t_camvid.py',
        'configs/demo/upernet_convnext-atto_camvid.py',
        'configs/demo/upernet_convnext-atto_shapes.py',
        ('mIoU', 'aAcc'),
        'held-out images',
    ),
}


class Skipped(Exception):
    """A task cannot run here; the message says why."""


class RunFailed(Exception):
    """A training did not finish; the message says why."""


class Recorder(Hook):
    """Puts a training on equal terms with another, and records it.

    Args:
        weights: Initial weights of the model.
        seed: Whatever is drawn in a step is drawn from a seed of that step.
        limit_s: Seconds after which the training is given up.
    """

    priority = 'VERY_LOW'

    def __init__(self, weights: dict[str, Tensor], seed: int, limit_s: float) -> None:
        self.weights, self.seed, self.limit_s = weights, seed, limit_s
        self.losses: list[dict[str, float]] = []
        self.batches: list[int] = []
        self.batch_sizes: list[int] = []
        self.times: list[float] = []
        self.metrics: dict[str, float] = {}
        self.peak_bytes: int | None = None
        self.dtype: torch.dtype | None = None

    def before_train(self, runner) -> None:
        runner.model.load_state_dict(self.weights)
        self.times.append(time.perf_counter())
        set_random_seed(self.seed)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if (
            len(self.losses) == runner.max_iters // WARM_UP_SHARE
            and torch.cuda.is_available()
        ):
            # What choosing kernels allocated is not the training's.
            torch.cuda.reset_peak_memory_stats()
        set_random_seed(self.seed + runner.iter)
        # A sample of the pixels tells batches and their augmentation apart.
        inputs, digest = list(data_batch['inputs']), 0
        for image in inputs:
            digest = zlib.crc32(image[:, ::16, ::16].numpy().tobytes(), digest)
        self.batches.append(digest)
        self.batch_sizes.append(len(inputs))

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        # Reading a loss waits for the device.
        losses = {k: float(v) for k, v in outputs.items() if 'loss' in k}
        self.losses.append(losses)
        self.times.append(time.perf_counter())
        if not math.isfinite(losses['loss']):
            raise RunFailed(f'the loss of step {len(self.losses)} is {losses["loss"]}')
        elapsed = self.times[-1] - self.times[0]
        if elapsed > self.limit_s and len(self.losses) < runner.max_iters:
            raise RunFailed(
                f'{len(self.losses)} of {runner.max_iters} steps took '
                f'{elapsed:.0f} s, the limit is {self.limit_s:.0f} s: give '
                'more with --limit, or train fewer with --steps'
            )
        # Without worker processes the next batch is drawn in this one.
        set_random_seed(self.seed + runner.iter)

    def before_val(self, runner) -> None:
        self.dtype = runner.optim_wrapper.cast_dtype or torch.float32
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.metrics = dict(metrics)

    def result(self, metrics: tuple) -> dict:
        """Of a finished run, speed and memory after the warm-up. COCO's
        metric gives none where nothing was predicted: None."""
        steps = len(self.losses)
        skipped = steps // WARM_UP_SHARE
        seconds = self.times[-1] - self.times[skipped]
        return dict(
            dtype=str(self.dtype).replace('torch.', ''),
            metrics={
                k: float(self.metrics[k]) if k in self.metrics else None
                for k in metrics
            },
            final_loss=final_loss(self.losses),
            images_per_second=sum(self.batch_sizes[skipped:]) / seconds,
            seconds=self.times[-1] - self.times[0],
            peak_memory_mib=(
                None if self.peak_bytes is None else self.peak_bytes / 2**20
            ),
        )


def final_loss(losses: list[dict[str, float]]) -> float:
    """Mean over the last tenth of the steps."""
    last = losses[-max(1, len(losses) // 10) :]
    return fmean(step['loss'] for step in last)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', metavar='OUT', help='folder for the results')
    parser.add_argument(
        '--data',
        default=str(ROOT.parent / 'shared/data'),
        metavar='DIR',
        help='folder with coco_tiny and camvid '
        '(../shared/data); what is missing is left out',
    )
    parser.add_argument('--only', choices=TASKS, help='only this task')
    parser.add_argument(
        '--smoke',
        action='store_true',
        help='a few steps of a small network on a CPU; on '
        'drawn shapes where the data is missing',
    )
    parser.add_argument(
        '--steps', type=int, help='steps of each training (as the config says)'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed (0)')
    parser.add_argument(
        '--limit',
        type=float,
        default=LIMIT_S,
        metavar='S',
        help=f'seconds after which a training is given up ({LIMIT_S})',
    )
    parser.add_argument(
        '--tolerance',
        type=float,
        default=0.1,
        help='largest relative difference of the final losses, '
        'means of the last tenth of the steps (0.1)',
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f'--steps must be at least 1, got {args.steps}')
    if not args.smoke and not torch.cuda.is_available():
        parser.error('no GPU found; --smoke tries everything on a CPU')
    return args


def read_config(name: str, args: argparse.Namespace, scratch: Path) -> Config:
    """The config of a task with this package's backbone.

    Raises:
        Skipped: Its data is missing.
    """
    task = TASKS[name]
    data, path = Path(args.data) / task.folder, task.config
    if args.smoke:
        path = task.smoke_config
    if args.smoke and not data.is_dir():
        path, data = task.drawn_config, scratch / 'shapes'
        if not data.is_dir():
            write_shapes(data, num_train=8, num_val=4, size=192)
    if not data.is_dir():
        raise Skipped(
            f'{data} does not exist: put {task.folder} there or '
            'say with --data where it is'
        )
    cfg = load_config(
        str(ROOT / path), work_dir=str(scratch / name), data_root=str(data)
    )
    cfg.relative_path = path
    if args.smoke:
        shrink(cfg)
    if args.steps or args.smoke:
        set_steps(cfg, args.steps or SMOKE_STEPS)
    cfg.randomness = dict(seed=args.seed)
    cfg.default_hooks.checkpoint = None
    fit_to_device(cfg, 'cpu' if args.smoke else None)
    try:
        check_data(cfg, ['train_dataloader', 'val_dataloader'])
    except ValueError as error:
        raise Skipped(str(error)) from error
    return cfg


def shrink(cfg: Config) -> None:
    """A config for a CPU: bf16 autocast, few images, no worker processes."""
    cfg.optim_wrapper.update(type='convnext_mm.AmpOptimWrapper', dtype='bfloat16')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.update(
        batch_size=2,
        batch_sampler=None,
        sampler=dict(type='InfiniteSampler', shuffle=True),
    )
    cfg.val_dataloader.dataset.indices = 4


def set_steps(cfg: Config, steps: int) -> None:
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps)
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks.logger.log_metric_by_epoch = False
    warmup = max(1, steps // 10)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup),
        dict(
            type='CosineAnnealingLR',
            by_epoch=False,
            begin=warmup,
            end=steps,
            eta_min=0.01 * cfg.optim_wrapper.optimizer.lr,
        ),
    ]


def check_operators() -> None:
    """
    Raises:
        Skipped: mmcv's operators cannot run on the GPU.
    """
    try:
        from mmcv.ops import nms

        nms(
            torch.rand(2, 4, device='cuda').cumsum(1), torch.rand(2, device='cuda'), 0.5
        )
    except (ImportError, RuntimeError) as error:
        raise Skipped(
            "mmcv's operators do not run on this GPU "
            f'({str(error).splitlines()[0]}): install one built for '
            'it, with --wheels'
        ) from error


def train(
    cfg: Config, weights: dict[str, Tensor], name: str, args: argparse.Namespace
) -> Recorder:
    """A whole run.

    Raises:
        RunFailed: It did not finish.
    """
    cfg.experiment_name = name
    recorder = Recorder(weights, args.seed, args.limit)
    with running(cfg) as runner:
        runner.register_hook(recorder)
        runner.train()
    return recorder


def compare(
    task: str,
    args: argparse.Namespace,
    scratch: Path,
    finished: Callable[[str, dict], None],
) -> dict:
    """Both runs of a task.

    Args:
        finished: Gets each run's name and result as soon as there is one.

    Raises:
        Skipped: It cannot run here.
        RunFailed: A run did not finish.
    """
    if task == 'detector' and not args.smoke:
        check_operators()
    cfg = read_config(task, args, scratch)
    cfgs = dict(convnext_mm=cfg, mmpretrain=with_mmpretrain(cfg))
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        weights = {
            name: model.state_dict()
            for name, model in build_models(cfgs, args.seed).items()
        }
    recorders, runs = {}, {}
    for name, config in cfgs.items():
        print(f'--- {task} with {name} ---', flush=True)
        recorder = train(config, weights[name], f'{task}_{name}', args)
        recorders[name] = recorder
        runs[name] = recorder.result(TASKS[task].metrics)
        finished(name, dict(runs[name], losses=recorder.losses))
        gc.collect()
        torch.cuda.empty_cache()
    ours, theirs = (recorders[name] for name in ('convnext_mm', 'mmpretrain'))
    if ours.batches != theirs.batches:
        raise RunFailed('the two trainings saw different batches')
    final = [run['final_loss'] for run in runs.values()]
    return dict(
        config=cfg.relative_path,
        data=Path(cfg.data_root).name,
        arch=cfg.model.backbone.arch,
        steps=len(ours.losses),
        seed=args.seed,
        batch=ours.batch_sizes[0],
        judged_on=TASKS[task].judged_on,
        runs=runs,
        relative_difference_of_final_loss=abs(final[0] - final[1]) / final[1],
        relative_deviation=[
            abs(a['loss'] - b['loss']) / abs(b['loss'])
            for a, b in zip(ours.losses, theirs.losses)
        ],
        losses={name: r.losses for name, r in recorders.items()},
    )


def commit() -> str | None:
    """Of the checkout, None outside of git."""
    try:
        return subprocess.run(
            ['git', 'rev-parse', 'HEAD'],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def say(task: str, result: dict) -> None:
    for name, run in result['runs'].items():
        memory = run['peak_memory_mib']
        numbers = [f'final loss {run["final_loss"]:.4f}']
        numbers += [
            f'{k} {"none" if v is None else format(v, ".3f")}'
            for k, v in run['metrics'].items()
        ]
        numbers += [
            f'{run["images_per_second"]:.1f} images/s',
            'peak memory not measured'
            if memory is None
            else f'peak memory {memory:.0f} MiB',
        ]
        print(f'{task}, {name}, {run["dtype"]}: {", ".join(numbers)}')
    difference = result['relative_difference_of_final_loss']
    print(f'{task}: final losses differ by {difference:.2%}')


def main(argv=None) -> int:
    args = parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report = dict(
        command=shlex.join(
            [
                'tools/maintenance/gpu_train.py',
                *(sys.argv[1:] if argv is None else map(str, argv)),
            ]
        ),
        commit=commit(),
        machine=machine('cpu' if args.smoke else 'cuda'),
        versions=versions(),
        impl=os.environ.get('CONVNEXT_MM_IMPL', 'auto'),
        smoke=args.smoke,
        results={},
        skipped={},
        failed={},
        unpaired={},
    )

    def save() -> None:
        write_text(out / 'training.json', json.dumps(report, indent=1) + '\n')

    with tempfile.TemporaryDirectory() as scratch:
        for task in [args.only] if args.only else TASKS:
            runs = report['unpaired'][task] = {}

            def finished(name: str, run: dict, runs: dict = runs) -> None:
                runs[name] = run
                save()

            try:
                report['results'][task] = compare(task, args, Path(scratch), finished)
                runs.clear()
            except Skipped as error:
                report['skipped'][task] = str(error)
            except RunFailed as error:
                report['failed'][task] = str(error)
            except Exception as error:  # whatever a library or driver may raise
                traceback.print_exc()
                report['failed'][task] = one_line(error)
            if not runs:
                del report['unpaired'][task]
            save()
    results = report['results']
    if results:
        plot(results, args.tolerance, out / 'training.png')
    for task, result in results.items():
        say(task, result)
    for word in ('skipped', 'failed'):
        for task, reason in report[word].items():
            print(f'{task} {word}: {reason}')
    apart = [
        task
        for task, result in results.items()
        if result['relative_difference_of_final_loss'] > args.tolerance
    ]
    if apart:
        print(
            f'{" and ".join(apart)}: the final losses differ by more than '
            f'{args.tolerance:.0%}'
        )
    return 1 if apart or report['failed'] or not results else 0


if __name__ == '__main__':
    sys.exit(main())
