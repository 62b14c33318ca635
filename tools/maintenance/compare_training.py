"""Trains a detector and a segmentor twice from the same weights on the same
batches: with this package's backbone and with mmpretrain's, in fp32. Writes and
draws both loss curves, and ends with status 1 where they differ by more than
the tolerance at any step."""

import argparse
import copy
import json
import sys
from pathlib import Path

import matplotlib
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import nn

from convnext_mm.apis.benchmark.models import build_models, set_arch, with_mmpretrain
from convnext_mm.apis.config import load_config
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.launch import fit_to_device

matplotlib.use('Agg')
import matplotlib.pyplot as plt

# Config and, below the folder of real data, its data.
TASKS = {
    'detector': ('configs/demo/mask-rcnn_convnext-atto_coco-tiny.py', 'coco_tiny'),
    'segmentor': ('configs/demo/upernet_convnext-atto_camvid.py', 'camvid'),
}
# A detector chooses: roundoff that swaps two proposals of nearly equal score or
# moves one across an IoU threshold, changes what is learned from by a whole
# proposal. So that such a step weighs little and does not grow, the published
# number of proposals is kept, every one of them is learned from instead of a
# random part (which one swap would draw anew), and the learning rate and its
# warm-up are the published ones. A narrower box head makes up for the time.
DETECTOR_OPTIONS = {
    'model.train_cfg.rpn_proposal.nms_pre': 2000,
    'model.train_cfg.rpn_proposal.max_per_img': 1000,
    'model.train_cfg.rcnn.sampler.num': 10_000,
    'model.train_cfg.rcnn.sampler.pos_fraction': 1.0,
    'model.roi_head.bbox_head.fc_out_channels': 128,
    'optim_wrapper.optimizer.lr': 1e-4,
    'param_scheduler.0.start_factor': 0.001,
    'param_scheduler.0.end': 501,
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--data',
        default='../shared/data',
        metavar='DIR',
        help='folder with coco_tiny and camvid',
    )
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
    parser.add_argument('--arch', default='atto', help='architecture (atto)')
    parser.add_argument('--steps', type=int, default=50, help='steps (50)')
    parser.add_argument('--seed', type=int, default=0, help='seed (0)')
    parser.add_argument(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest relative difference of a loss (1e-3)',
    )
    parser.add_argument(
        '--out',
        default='benchmarks/training_parity.json',
        metavar='FILE',
        help='raw results',
    )
    parser.add_argument(
        '--plot', default='docs/training_parity.png', metavar='FILE', help='both curves'
    )
    return parser.parse_args(argv)


def read_config(task: str, args: argparse.Namespace) -> Config:
    """The config of a task: the chosen arch, drop path off, data in the main
    process.

    Raises:
        ValueError: The data is missing; says where it was looked for.
    """
    path, folder = TASKS[task]
    cfg = load_config(
        str(Path(__file__).resolve().parents[2] / path),
        data_root=str(Path(args.data) / folder),
        cfg_options=DETECTOR_OPTIONS if task == 'detector' else None,
    )
    fit_to_device(cfg)
    check_data(cfg, ['train_dataloader'])
    set_arch(cfg, args.arch)
    cfg.model.backbone.drop_path_rate = 0.0
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    return cfg


def collect_batches(cfg: Config, steps: int, seed: int) -> list[dict]:
    """The first batches of training, augmented once for both models."""
    set_random_seed(seed)
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=seed)
    batches: list[dict] = []
    while len(batches) < steps:
        for batch in loader:
            batches.append(batch)
            if len(batches) == steps:
                break
    return batches


def train(
    model: nn.Module, cfg: Config, batches: list[dict], seed: int
) -> list[dict[str, float]]:
    """Losses of each step. Whatever is drawn in a step (proposals to learn
    from, dropout) is drawn from a seed of that step."""
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedulers = [
        PARAM_SCHEDULERS.build({**s, 'optimizer': optim_wrapper})
        for s in cfg.param_scheduler
        if not s.get('by_epoch', True)
    ]
    model.train()
    losses = []
    for step, batch in enumerate(batches):
        set_random_seed(seed + step)
        log = model.train_step(copy.deepcopy(batch), optim_wrapper)
        for scheduler in schedulers:
            scheduler.step()
        losses.append({k: float(v.detach()) for k, v in log.items() if 'loss' in k})
    return losses


def compare(task: str, args: argparse.Namespace) -> dict:
    """Both runs of a task and how far they are apart."""
    cfg = read_config(task, args)
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        batches = collect_batches(cfg, args.steps, args.seed)
        runs = {}
        cfgs = dict(convnext_mm=cfg, mmpretrain=with_mmpretrain(cfg))
        for name, model in build_models(cfgs, args.seed).items():
            runs[name] = train(model, cfg, batches, args.seed)
            print(
                f'{task}, {name}: loss {runs[name][0]["loss"]:.4f} -> '
                f'{runs[name][-1]["loss"]:.4f}',
                flush=True,
            )
    deviations = [
        abs(a['loss'] - b['loss']) / abs(b['loss'])
        for a, b in zip(runs['convnext_mm'], runs['mmpretrain'])
    ]
    return dict(
        config=TASKS[task][0],
        data=TASKS[task][1],
        arch=args.arch,
        steps=args.steps,
        seed=args.seed,
        dtype='float32',
        torch=torch.__version__,
        losses=runs,
        relative_deviation=deviations,
        largest_relative_deviation=max(deviations),
    )


def plot(results: dict[str, dict], tolerance: float, path: Path) -> None:
    figure, axes = plt.subplots(
        2,
        len(results),
        figsize=(5 * len(results), 6),
        squeeze=False,
        sharex=True,
        height_ratios=(2, 1),
    )
    for (upper, lower), (task, result) in zip(axes.T, results.items()):
        steps = range(1, result['steps'] + 1)
        for (name, run), style in zip(result['losses'].items(), ('-', '--')):
            upper.plot(steps, [r['loss'] for r in run], style, label=name, linewidth=2)
        upper.set(
            title=f'{task}: {Path(result["config"]).stem}, {result["arch"]}',
            ylabel='loss',
        )
        upper.title.set_fontsize(9)
        upper.legend()
        # A logarithmic axis has no place for exact agreement.
        lower.plot(steps, [max(d, 1e-9) for d in result['relative_deviation']])
        lower.axhline(tolerance, color='grey', linestyle=':')
        lower.set(xlabel='step', ylabel='relative difference', yscale='log')
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        results = {task: compare(task, args) for task in args.tasks}
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + '\n')
    plot(results, args.tolerance, Path(args.plot))
    for task, result in results.items():
        print(
            f'{task}: largest relative difference of the loss over '
            f'{result["steps"]} steps '
            f'{result["largest_relative_deviation"]:.1e}'
        )
    worst = max(r['largest_relative_deviation'] for r in results.values())
    return 0 if worst <= args.tolerance else 1


if __name__ == '__main__':
    sys.exit(main())
