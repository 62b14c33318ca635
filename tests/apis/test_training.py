"""Whole runs through the command-line tools, on a CPU."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from convnext_mm.datasets import write_shapes
from convnext_mm.engine.optimizers.amp import has_bf16
from repo import COCO_TINY, FEW_ITERATIONS, ROOT, SHAPES, free_port, records, run, tool
from warm_python import warm_python


def metrics(work_dir):
    last = [r for r in records(work_dir) if any(k.startswith('coco/') for k in r)][-1]
    return {k: v for k, v in last.items() if k.startswith('coco/')}


def metrics_of_test(work_dir):
    """test.py writes its metrics as one json of its own."""
    path = max(work_dir.glob('*/*.json'), key=os.path.getmtime)
    return {
        k: v for k, v in json.loads(path.read_text()).items() if k.startswith('coco/')
    }


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes')
    write_shapes(path, num_train=12, num_val=4, size=96)
    return path


@pytest.mark.slow
def test_train_test_resume(shapes, tmp_path):
    common = ('--data-root', shapes, '--cfg-options', *FEW_ITERATIONS)
    said = tool('train', SHAPES, '--work-dir', tmp_path / 'a', '--amp', *common)
    dtype = 'bfloat16' if has_bf16('cpu') else 'full'
    assert f'Training on cpu in {dtype} precision' in said
    assert 'Layer decay: layer_wise, rate 1.0' in said
    assert 'coco/segm_mAP' in said or 'segm_mAP' in said
    trained = metrics(tmp_path / 'a')
    assert 'coco/bbox_mAP_50' in trained and 'coco/segm_mAP_50' in trained

    said = tool(
        'test',
        SHAPES,
        tmp_path / 'a' / 'iter_6.pth',
        '--work-dir',
        tmp_path / 'b',
        '--show-dir',
        tmp_path / 'pictures',
        *common,
    )
    assert metrics_of_test(tmp_path / 'b') == trained
    assert list((tmp_path / 'pictures').glob('**/*.png'))
    tool(
        'test',
        SHAPES,
        tmp_path / 'a' / 'iter_6.pth',
        '--work-dir',
        tmp_path / 'c',
        '--deploy',
        *common,
    )
    assert metrics_of_test(tmp_path / 'c') == pytest.approx(trained, abs=0.005)

    before = torch.load(tmp_path / 'a' / 'iter_6.pth', weights_only=False)
    tool(
        'train',
        SHAPES,
        '--work-dir',
        tmp_path / 'a',
        '--resume',
        *common,
        'train_cfg.max_iters=7',
    )
    steps = [r['step'] for r in records(tmp_path / 'a') if 'loss' in r]
    assert steps == list(range(1, 8))
    after = torch.load(tmp_path / 'a' / 'iter_7.pth', weights_only=False)
    assert after['meta']['iter'] == 7 and before['meta']['iter'] == 6
    counts = [state['step'] for state in after['optimizer']['state'].values()]
    assert all(int(count) == 7 for count in counts)


@pytest.mark.slow
def test_two_deterministic_runs_give_identical_weights(shapes, tmp_path):
    weights = []
    # A Python of its own for one: of other hash seed and memory addresses.
    for name, python in dict(a=sys.executable, b=warm_python()).items():
        run(
            python,
            'tools/train.py',
            SHAPES,
            '--data-root',
            shapes,
            '--work-dir',
            tmp_path / name,
            '--cfg-options',
            *FEW_ITERATIONS,
            'randomness.deterministic=True',
            'train_cfg.val_interval=100',
            'model.backbone.drop_path_rate=0.3',
        )
        weights.append(
            torch.load(tmp_path / name / 'iter_6.pth', weights_only=False)['state_dict']
        )
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.slow
def test_dist_train_on_a_cpu(shapes, tmp_path):
    config = tmp_path / 'sync_bn.py'
    # Statistics that stay as they are: else each process evaluates with its own.
    config.write_text(f"""_base_ = {str(ROOT / SHAPES)!r}
norm_cfg = dict(_delete_=True, type='SyncBN', momentum=0.0)
model = dict(neck=dict(norm_cfg=norm_cfg),
             roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
""")
    options = (
        *FEW_ITERATIONS,
        *(f'{name}=2' for name in ('train_cfg.max_iters', 'train_cfg.val_interval')),
        'default_hooks.checkpoint.interval=2',
    )
    said = run(
        'bash',
        'tools/dist_train.sh',
        config,
        2,
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *options,
        port=free_port(),
        python=sys.executable,  # also shuts down as it does for a user
    )
    assert said.count('No SyncBN on a CPU: 2 norm settings use BN') == 1
    trained = metrics(tmp_path)
    run(
        'bash',
        'tools/dist_test.sh',
        config,
        tmp_path / 'iter_2.pth',
        2,
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path / 'test',
        '--cfg-options',
        *options,
        port=free_port(),
        python=warm_python(),
    )
    assert metrics_of_test(tmp_path / 'test') == trained


def test_dist_scripts_say_what_is_missing():
    assert 'usage: bash tools/dist_train.sh CONFIG' in run(
        'bash', 'tools/dist_train.sh', check=False
    )
    said = run('bash', 'tools/dist_test.sh', SHAPES, 'a.pth', check=False)
    assert 'say how many processes' in said


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_real_coco_images(shared_dir, tmp_path, processes):
    data = ('--data-root', shared_dir / 'data' / 'coco_tiny')
    options = (
        '--cfg-options',
        # Eight steps of two images in an epoch, few images to judge.
        f'train_dataloader.batch_size={2 // processes}',
        'train_dataloader.dataset.indices=16',
        'val_dataloader.dataset.indices=4',
        'test_dataloader.dataset.indices=4',
        # Boxes that are found so early have low scores.
        'model.test_cfg.rcnn.score_thr=0.005',
        'model.test_cfg.rcnn.max_per_img=20',
        'param_scheduler.0.end=4',
        'default_hooks.logger.interval=1',
    )
    common = (*data, '--work-dir', tmp_path, *options)
    if processes == 1:
        tool('train', COCO_TINY, *common)
    else:
        run(
            'bash',
            'tools/dist_train.sh',
            COCO_TINY,
            2,
            *common,
            port=free_port(),
            python=warm_python(),
        )
    losses = [r['loss'] for r in records(tmp_path) if 'loss' in r]
    assert len(losses) == 16 and np.isfinite(losses).all()
    # Each record is a mean over a window: compare first and last quarters.
    quarter = len(losses) // 4
    assert np.mean(losses[-quarter:]) < 0.8 * np.mean(losses[:quarter])
    trained = metrics(tmp_path)
    tool(
        'test',
        COCO_TINY,
        tmp_path / 'epoch_2.pth',
        *data,
        '--work-dir',
        tmp_path / 'test',
        *options,
    )
    tested = metrics_of_test(tmp_path / 'test')
    assert set(tested) == set(trained) and 'coco/segm_mAP_50' in tested
    for name, value in tested.items():
        assert value == pytest.approx(trained[name], abs=1e-3), name
    few = ('train_cfg.max_epochs=3', 'train_dataloader.dataset.indices=4')
    tool('train', COCO_TINY, *common, *few, '--resume')
    epochs = [r['epoch'] for r in records(tmp_path) if 'loss' in r]
    assert epochs == sorted(epochs) and set(epochs) == {1, 2, 3}


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
        'bbox_mAP_50=0.70',
        '--cfg-options',
        *FEW_ITERATIONS,
        check=False,
    )
    assert 'NOT REACHED' in said and 'did not reach' in said, said[-3000:]
    assert 'convnext-mm train mask-rcnn_convnext-t_fpn' in said
    assert f'convnext-mm infer {tmp_path}/work {data}/images' in said
    assert len(list((tmp_path / 'work' / 'pictures').glob('*.png'))) == 4
    steps = [r['step'] for r in records(tmp_path / 'work') if 'loss' not in r]
    assert steps == [3, 6]
    # A demo deletes what was there; its work folder, as a config, does not.
    for config in (tmp_path / 'work', tmp_path / 'work' / Path(SHAPES).name):
        said = tool('train', config, check=False)
        assert '--overwrite' in said and 'error: ' in said, said[-3000:]
        assert (tmp_path / 'work/iter_6.pth').is_file()
    again = ('demo', SHAPES, '--data-root', data, '--work-dir', tmp_path / 'work')
    said = tool(*again, '--resume', '--cfg-options', *FEW_ITERATIONS)
    assert 'is left to train' in said and 'starts anew' not in said
    for name in ('overview.png', 'curves.png'):
        assert (tmp_path / 'work' / name).stat().st_size > 10_000
