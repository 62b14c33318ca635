"""Training a demo config on drawn shapes, and showing what it learned."""

import time
from pathlib import Path
from typing import Any

import mmcv
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.launch import fit_to_device, running
from convnext_mm.engine.work_folder import checkpoints

from .config import load_config, program
from .config_check import check_config
from .draw import draw_sample
from .show import read_run
from .show.runs import Run

NUM_PICTURES = 8
MAIN_METRICS = ('bbox_mAP', 'segm_mAP', 'mIoU')  # drawn where no goals are set
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


def run_demo(
    config: str, goals: dict[str, float], resume: bool = False, **options: Any
) -> bool:
    """Draws the data where it is missing, trains, and writes predictions
    beside ground truth and curves into the work folder.

    Args:
        config: Path of a demo config.
        goals: Metrics to reach, without their prefix, in [0, 1].
        resume: Go on with a demo that was interrupted; without, it starts anew and
            deletes what that one left.
        **options: Of :func:`convnext_mm.apis.config.load_config`.

    Returns:
        Whether all goals were reached.

    Raises:
        ConfigError, DataError: A path or setting is wrong.
    """
    start = time.time()
    cfg = load_config(config, **options)
    cfg.resume, cfg.overwrite = resume, not resume
    if not resume and checkpoints(cfg.work_dir):
        print_log(
            f'The demo starts anew, and deletes the checkpoints in {cfg.work_dir}; '
            '--resume goes on with them.',
            'current',
        )
    check_config(cfg, 'train')
    draw_data(Path(cfg.data_root))
    fit_to_device(cfg)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    with running(cfg) as runner:
        runner.train()
        draw_pictures(runner, Path(cfg.work_dir) / 'pictures')
    run = read_run(cfg.work_dir)
    unit = 0.01 if cfg.default_scope == 'mmseg' else 1
    metrics = last_metrics(run, unit)
    drawn = [name for name in metrics if name in (goals or MAIN_METRICS)]
    plot_curves(run, drawn, unit, Path(cfg.work_dir) / 'curves.png')
    return report(metrics, goals, cfg, (time.time() - start) / 60)


def draw_data(root: Path) -> None:
    # Written last: without it the drawing was interrupted.
    if not (root / 'annotations/instances_validation.json').is_file():
        write_shapes(str(root))


def last_metrics(run: Run, unit: float) -> dict[str, float]:
    """Metrics of the last evaluation in [0, 1], without their prefix (``coco/``).

    Args:
        run: What was logged.
        unit: 0.01 where metrics are in percent.
    """
    return {name.split('/')[-1]: unit * p[-1][1] for name, p in run.metrics.items()}


def plot_curves(run: Run, names: list[str], unit: float, path: Path) -> None:
    """Draws the losses, and the metrics called ``names``."""
    figure = Figure(figsize=(10, 4), layout='tight')
    left, right = figure.subplots(1, 2)
    for name in sorted(n for n in run.training if 'loss' in n):
        steps, values = zip(*run.training[name])
        left.plot(steps, values, label=name, linewidth=2 if name == 'loss' else 1)
    left.set(title='Training loss', xlabel='iteration', ylim=(0, None))
    left.legend()
    for name, points in run.metrics.items():
        if name.split('/')[-1] in names:
            steps, values = zip(*points)
            right.plot(steps, [unit * v for v in values], marker='o', label=name)
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
    for column in ('metric', 'value', *(('required', '') if goals else ())):
        table.add_column(column)
    work_dir = Path(cfg.work_dir)
    shown = {**dict.fromkeys(goals), **metrics}
    reached = True
    for name in shown:
        value = metrics.get(name)
        good = name not in goals or (value is not None and value >= goals[name])
        reached &= good
        judged = (
            f'{goals[name]:.2f}' if name in goals else '',
            'reached' if name in goals and good else '' if good else '[red]NOT REACHED',
        )
        shown_value = '-' if value is None else f'{value:.3f}'
        table.add_row(name, shown_value, *(judged if goals else ()))
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
                config=Path(cfg.filename).stem,
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
