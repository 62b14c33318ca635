"""Whole runs of segmentors through the command-line tools, on a CPU."""

import json
import os

import numpy as np
import pytest

from convnext_mm.datasets import write_shapes
from repo import records, tool

pytest.importorskip('mmseg')
SHAPES = 'configs/demo/upernet_convnext-atto_shapes.py'
CAMVID = 'configs/demo/upernet_convnext-atto_camvid.py'
ADE = 'configs/demo/upernet_convnext-atto_ade20k-sample.py'
IN_PROCESS = [
    f'{name}_dataloader.{option}'
    for name in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]


def metrics(record):
    return {k: record[k] for k in ('aAcc', 'mIoU', 'mAcc')}


def metrics_of_test(work_dir):
    path = max(work_dir.glob('*/*.json'), key=os.path.getmtime)
    return metrics(json.loads(path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, folder, iterations, falls_to',
    [(CAMVID, 'camvid', 20, 0.85), (ADE, 'ade20k_sample', 20, 0.9)],
)
def test_real_images(config, folder, iterations, falls_to, shared_dir, tmp_path):
    """Train, evaluate, test, resume."""
    options = (
        '--cfg-options',
        *IN_PROCESS,
        'train_cfg.val_interval=100',
        'default_hooks.logger.interval=1',
        f'default_hooks.checkpoint.interval={iterations // 2}',
        'train_dataloader.batch_size=2',
        'param_scheduler.0.end=5',
        # A few of the held-out images.
        'val_dataloader.dataset.indices=6',
        'test_dataloader.dataset.indices=6',
    )
    if config == ADE:
        options = options[:-2]
    data = ('--data-root', shared_dir / 'data' / folder)
    said = tool(
        'train',
        config,
        *data,
        '--work-dir',
        tmp_path / 'a',
        *options,
        f'train_cfg.max_iters={iterations}',
    )
    assert 'mIoU' in said
    training = [r for r in records(tmp_path / 'a') if 'loss' in r]
    losses = [r['loss'] for r in training]
    assert len(losses) == iterations and np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < falls_to * np.mean(losses[:5])
    trained = metrics([r for r in records(tmp_path / 'a') if 'mIoU' in r][-1])

    checkpoint = tmp_path / 'a' / f'iter_{iterations}.pth'
    tool('test', config, checkpoint, *data, '--work-dir', tmp_path / 'b', *options)
    tested = metrics_of_test(tmp_path / 'b')
    assert tested == pytest.approx(trained, abs=0.02)

    tool(
        'train',
        config,
        *data,
        '--work-dir',
        tmp_path / 'a',
        '--resume',
        *options,
        f'train_cfg.max_iters={iterations + 2}',
    )
    steps = [r['step'] for r in records(tmp_path / 'a') if 'loss' in r]
    assert steps == list(range(1, iterations + 3))


@pytest.mark.slow
def test_demo_shows_and_judges(tmp_path):
    """A few iterations: everything is drawn, and the figures are missed."""
    data = tmp_path / 'shapes'
    write_shapes(data, num_train=8, num_val=4, size=96)
    said = tool(
        'demo',
        SHAPES,
        '--data-root',
        data,
        '--work-dir',
        tmp_path / 'work',
        '--require',
        'mIoU=0.80',
        '--cfg-options',
        *IN_PROCESS,
        'train_cfg.max_iters=4',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        check=False,
    )
    assert 'NOT REACHED' in said and 'did not reach' in said, said[-3000:]
    assert 'convnext-mm train convnext-tiny_upernet' in said
    assert len(list((tmp_path / 'work' / 'pictures').glob('*.png'))) == 4
    for name in ('overview.png', 'curves.png'):
        assert (tmp_path / 'work' / name).stat().st_size > 10_000
