"""Training a demo config on drawn shapes, and showing what it learned."""

import json
import os
import time
from pathlib import Path
from typing import Any

import mmcv
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.launch import fit_to_device, running

from .config import load_config, program
from .config_check import check_config
from .draw import draw_sample

NUM_PICTURES = 8
THRESHOLD = 0.3  # lowest score that is drawn
NEXT_STEPS = {
    'mmdet': (
        'train on COCO',
        '{program} train mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco --gpus 8 '
        '--data-root data/coco',
    ),
    'mmseg': (
        'train on ADE20K',
        '{program} train convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512 --gpus 8 '
        '--data-root data/ade/ADEChallengeData2016',
    ),
}
NEXT_STEPS_OF_ALL = (
    ('look at pictures with it', '{program} infer {work_dir} {data_root}/images'),
    (
        'use it in your own config',
        "backbone=dict(type='convnext_mm.ConvNeXt', "
        "arch='tiny', out_indices=(0, 1, 2, 3))",
    ),
    ('the same on one GPU', '{program} train {config} --amp'),
)


def run_demo(config: str, goals: dict[str, float], **options: Any) -> bool:
    """Draws the data where it is missing, trains, and writes predictions
    beside ground truth and curves into the work folder.

    Args:
        config: Path of a demo config.
        goals: Metrics to reach, without their prefix, in [0, 1].
        **options: Of :func:`convnext_mm.apis.config.load_config`.

    Returns:
        Whether all goals were reached.

    Raises:
        ConfigError, DataError: A path or setting is wrong.
    """
    start = time.time()
    cfg = load_config(config, **options)
    cfg.overwrite = True  # a demo starts from the beginning
    check_config(cfg, 'train')
    draw_data(Path(cfg.data_root))
    fit_to_device(cfg)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    with running(cfg) as runner:
        runner.train()
        draw_pictures(runner, Path(cfg.work_dir) / 'pictures')
        training, evaluations = read_log(runner)
    metrics = last_metrics(evaluations, cfg.default_scope)
    plot_curves(
        training,
        evaluations,
        [n for n in goals if n in metrics],
        cfg.default_scope,
        Path(cfg.work_dir) / 'curves.png',
    )
    return report(metrics, goals, cfg, (time.time() - start) / 60)


def draw_data(root: Path) -> None:
    # Written last: without it the drawing was interrupted.
    if not (root / 'annotations/instances_validation.json').is_file():
        write_shapes(str(root))


def read_log(runner: Runner) -> tuple[list[dict], list[dict]]:
    """Training and evaluation records of this run, in order."""
    path = Path(runner._log_dir) / 'vis_data' / 'scalars.json'
    records = [json.loads(line) for line in path.read_text().splitlines()]
    training = [r for r in records if 'loss' in r]
    return training, [r for r in records if 'loss' not in r]


def last_metrics(evaluations: list[dict], scope: str) -> dict[str, float]:
    """Metrics of the last evaluation in [0, 1], without their prefix
    (``coco/``) and those that COCO gives as -1 because there are no such
    objects; MMSegmentation's are in percent."""
    unit = 0.01 if scope == 'mmseg' else 1
    return {
        name.split('/')[-1]: value * unit
        for name, value in evaluations[-1].items()
        if name not in ('step', 'time', 'data_time') and value >= 0
    }


def plot_curves(
    training: list[dict],
    evaluations: list[dict],
    names: list[str],
    scope: str,
    path: Path,
) -> None:
    figure = Figure(figsize=(10, 4), layout='tight')
    left, right = figure.subplots(1, 2)
    for name in sorted(n for n in training[0] if 'loss' in n):
        left.plot(
            [r['step'] for r in training],
            [r[name] for r in training],
            label=name,
            linewidth=2 if name == 'loss' else 1,
        )
    left.set(title='Training loss', xlabel='iteration', ylim=(0, None))
    left.legend()
    for name in names:
        right.plot(
            [r['step'] for r in evaluations],
            [last_metrics([r], scope)[name] for r in evaluations],
            marker='o',
            label=name,
        )
    right.set(title='Held-out images', xlabel='iteration', ylim=(0, 1))
    right.legend()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_pictures(runner: Runner, folder: Path) -> None:
    """Writes ground truth beside predictions, and one overview."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = runner.val_dataloader.dataset
    runner.model.eval()
    pictures = []
    for index in range(min(NUM_PICTURES, len(dataset))):
        sample = runner.model.test_step(pseudo_collate([dataset[index]]))[0]
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        path = folder / Path(sample.img_path).name
        drawn = draw_sample(image, sample.cpu(), dataset.metainfo, threshold=THRESHOLD)
        mmcv.imwrite(drawn[:, :, ::-1], str(path))
        pictures.append(drawn)
    rows = (len(pictures) + 1) // 2
    figure = Figure(figsize=(8, 2 * rows), layout='tight')
    axes = figure.subplots(rows, 2, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, picture in zip(axes.flat, pictures):
        axis.imshow(picture)
    figure.suptitle('Ground truth (left) and predictions (right), held-out')
    figure.savefig(folder.parent / 'overview.png', dpi=120)


def report(
    metrics: dict[str, float], goals: dict[str, float], cfg: Config, minutes: float
) -> bool:
    """Prints the metrics, which of the goals were reached, and what to do
    next; whether all were."""
    console = Console(soft_wrap=True)
    table = Table(title=f'Held-out results after {minutes:.1f} minutes')
    for column in ('metric', 'value', 'required', ''):
        table.add_column(column)
    work_dir = Path(cfg.work_dir)
    shown = {**dict.fromkeys(goals), **metrics}
    reached = True
    for name in shown:
        value = metrics.get(name)
        good = name not in goals or (value is not None and value >= goals[name])
        reached &= good
        table.add_row(
            name,
            '-' if value is None else f'{value:.3f}',
            f'{goals[name]:.2f}' if name in goals else '',
            'reached' if name in goals and good else '' if good else '[red]NOT REACHED',
        )
    console.print(table)
    for what, path in (
        ('pictures', 'pictures/'),
        ('overview', 'overview.png'),
        ('curves', 'curves.png'),
    ):
        console.print(f'{what:9} {work_dir / path}')
    console.print('\nNext:')
    for what, command in (NEXT_STEPS[cfg.default_scope], *NEXT_STEPS_OF_ALL):
        console.print(
            f'  {what}:\n    '
            + command.format(
                program=program(),
                config=os.path.relpath(cfg.filename),
                work_dir=work_dir,
                data_root=cfg.data_root.rstrip('/'),
            ),
            markup=False,
        )
    if not reached:
        console.print(
            '\n[red]The demo did not reach the required figures: '
            'something is wrong with this set-up.'
        )
    return reached
