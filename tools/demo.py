"""Trains a demo config on the shapes data set, then shows what it learned:
metrics, predictions beside ground truth and curves. Draws the data first where
it is missing. Ends with status 1 if a required figure is not reached."""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
import mmcv
import torch
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from convnext_mm.launch import (add_common_arguments, build_runner, check_data,
                                fit_to_device, load_config, short_errors)

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

NUM_PICTURES = 8
NEXT_STEPS = {
    'mmdet':
    ('train on COCO', 'bash tools/dist_train.sh configs/mask_rcnn/'
     'mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py 8 --data-root '
     'data/coco'),
    'mmseg': ('train on ADE20K', 'bash tools/dist_train.sh configs/upernet/'
              'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py 8 '
              '--data-root data/ade/ADEChallengeData2016'),
}
NEXT_STEPS_OF_ALL = (
    ('use it in your own config', "backbone=dict(type='convnext_mm.ConvNeXt', "
     "arch='tiny', out_indices=(0, 1, 2, 3))"),
    ('the same on one GPU', '.venv/bin/python tools/train.py {config} --amp'),
)


def required_figure(text: str) -> Tuple[str, float]:
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not METRIC=NUMBER')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the demo config')
    parser.add_argument(
        '--require',
        nargs='+',
        type=required_figure,
        default=[],
        metavar='METRIC=NUMBER',
        help='figures to reach, such as bbox_mAP_50=0.70')
    add_common_arguments(parser)
    return parser.parse_args()


def draw_data(root: Path) -> None:
    # Written last: without it the drawing was interrupted.
    if not (root / 'annotations/instances_validation.json').is_file():
        subprocess.run(
            [sys.executable, '-m', 'convnext_mm.datasets',
             str(root)], check=True)


def read_log(runner: Runner) -> Tuple[List[dict], List[dict]]:
    """Training and evaluation records of this run, in order."""
    path = Path(runner._log_dir) / 'vis_data' / 'scalars.json'
    records = [json.loads(line) for line in path.read_text().splitlines()]
    training = [r for r in records if 'loss' in r]
    return training, [r for r in records if 'loss' not in r]


def last_metrics(evaluations: List[dict], scope: str) -> Dict[str, float]:
    """Metrics of the last evaluation in [0, 1], without their prefix
    (``coco/``) and those that COCO gives as -1 because there are no such
    objects; MMSegmentation's are in percent."""
    unit = 0.01 if scope == 'mmseg' else 1
    return {
        name.split('/')[-1]: value * unit
        for name, value in evaluations[-1].items()
        if name not in ('step', 'time', 'data_time') and value >= 0
    }


def plot_curves(training: List[dict], evaluations: List[dict],
                names: List[str], scope: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name in sorted(n for n in training[0] if 'loss' in n):
        left.plot([r['step'] for r in training],
                  [r[name] for r in training],
                  label=name,
                  linewidth=2 if name == 'loss' else 1)
    left.set(title='Training loss', xlabel='iteration', ylim=(0, None))
    left.legend()
    for name in names:
        right.plot([r['step'] for r in evaluations],
                   [last_metrics([r], scope)[name] for r in evaluations],
                   marker='o',
                   label=name)
    right.set(title='Held-out images', xlabel='iteration', ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def draw_pictures(runner: Runner, folder: Path) -> None:
    """Writes ground truth (left) beside predictions (right), and one overview.
    """
    dataset = runner.val_dataloader.dataset
    runner.model.eval()
    pictures = []
    for index in range(min(NUM_PICTURES, len(dataset))):
        sample = runner.model.test_step(pseudo_collate([dataset[index]]))[0]
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        path = folder / Path(sample.img_path).name
        runner.visualizer.add_datasample(
            path.stem, image, sample.cpu(), out_file=str(path))
        pictures.append(mmcv.imread(path, channel_order='rgb'))
    rows = (len(pictures) + 1) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(8, 2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(picture)
    figure.suptitle('Ground truth (left) and predictions (right), held-out')
    figure.tight_layout()
    figure.savefig(folder.parent / 'overview.png', dpi=120)
    plt.close(figure)


def report(metrics: Dict[str, float], required: List[Tuple[str, float]],
           args: argparse.Namespace, scope: str, work_dir: Path,
           minutes: float) -> bool:
    console = Console(soft_wrap=True)
    table = Table(title=f'Held-out results after {minutes:.1f} minutes')
    for column in ('metric', 'value', 'required', ''):
        table.add_column(column)
    goals = dict(required)
    shown = {**{name: None for name in goals}, **metrics}
    reached = True
    for name in shown:
        value = metrics.get(name)
        good = name not in goals or (value is not None
                                     and value >= goals[name])
        reached &= good
        table.add_row(name, '-' if value is None else f'{value:.3f}',
                      f'{goals[name]:.2f}' if name in goals else '',
                      'reached' if name in goals and good else
                      '' if good else '[red]NOT REACHED')
    console.print(table)
    for what, path in (('pictures', 'pictures/'), ('overview', 'overview.png'),
                       ('curves', 'curves.png')):
        console.print(f'{what:9} {work_dir / path}')
    console.print('\nNext:')
    for what, command in (NEXT_STEPS[scope], *NEXT_STEPS_OF_ALL):
        console.print(f'  {what}:\n    ' + command.format(config=args.config),
                      markup=False)
    if not reached:
        console.print('\n[red]The demo did not reach the required figures: '
                      'something is wrong with this set-up.')
    return reached


def main() -> int:
    args = parse_args()
    start = time.time()
    try:
        cfg = load_config(args)
        draw_data(Path(cfg.data_root))
        fit_to_device(cfg)
        check_data(cfg, ['train_dataloader', 'val_dataloader'])
    except ValueError as error:
        raise SystemExit(f'error: {error}')
    runner = build_runner(cfg)
    with short_errors():
        runner.train()

    work_dir = Path(cfg.work_dir)
    pictures = work_dir / 'pictures'
    pictures.mkdir(parents=True, exist_ok=True)
    training, evaluations = read_log(runner)
    metrics = last_metrics(evaluations, cfg.default_scope)
    plot_curves(training, evaluations,
                [n for n, _ in args.require if n in metrics],
                cfg.default_scope, work_dir / 'curves.png')
    draw_pictures(runner, pictures)
    minutes = (time.time() - start) / 60
    reached = report(metrics, args.require, args, cfg.default_scope, work_dir,
                     minutes)
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
