"""``gpu_train.sh --smoke``: all of the GPU comparison, on a CPU."""

import json
import math
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from repo import ROOT
from warm_python import warm_python

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)
import gpu_train  # noqa: E402


def run(*arguments):
    env = {**os.environ, 'PYTHON': warm_python(), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        ['bash', 'tools/maintenance/gpu_train.sh', *map(str, arguments)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def check(result, task):
    """What one task's result says of both runs."""
    steps = gpu_train.SMOKE_STEPS
    assert set(result['runs']) == {'convnext_mm', 'mmpretrain'}
    assert result['steps'] == steps and result['batch'] == 2
    for name, one in result['runs'].items():
        curve = [step['loss'] for step in result['losses'][name]]
        assert len(curve) == steps and all(map(math.isfinite, curve))
        assert one['dtype'] == 'bfloat16'
        assert one['final_loss'] == pytest.approx(curve[-1])
        assert one['images_per_second'] > 0
        assert one['peak_memory_mib'] is None  # of GPUs only
        assert set(one['metrics']) == set(gpu_train.TASKS[task].metrics)
    # The same weights and batch: at the first step only roundoff differs.
    assert result['relative_deviation'][0] < 0.01
    ours, theirs = (
        result['runs'][n]['final_loss'] for n in ('convnext_mm', 'mmpretrain')
    )
    assert result['relative_difference_of_final_loss'] == pytest.approx(
        abs(ours - theirs) / theirs
    )


@pytest.mark.slow
def test_smoke_on_drawn_shapes(tmp_path):
    done = run(tmp_path, '--smoke', '--data', tmp_path / 'none')
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((tmp_path / 'training.json').read_text())
    assert report['unpaired'] == {}
    assert report['smoke'] and report['machine']['device'] == 'cpu'
    assert report['versions']['torch'] and not report['skipped']
    assert shlex.split(report['command'])[2] == '--smoke'
    assert set(report['results']) == {'detector', 'segmentor'}
    for task, result in report['results'].items():
        assert result['data'] == 'shapes'
        check(result, task)
        assert f'{task}, convnext_mm, bfloat16: final loss' in done.stdout
    assert (tmp_path / 'training.png').stat().st_size > 10_000


@pytest.mark.slow
def test_smoke_on_real_images(shared_dir, tmp_path):
    done = run(
        tmp_path, '--smoke', '--data', shared_dir / 'data', '--only', 'segmentor'
    )
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((tmp_path / 'training.json').read_text())
    assert set(report['results']) == {'segmentor'}
    assert report['results']['segmentor']['data'] == 'camvid'
    check(report['results']['segmentor'], 'segmentor')


def test_missing_data_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_train.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(gpu_train, 'machine', lambda device: {})
    monkeypatch.setattr(gpu_train, 'check_operators', lambda: None)
    assert gpu_train.main([str(tmp_path), '--data', str(tmp_path)]) == 1
    report = json.loads((tmp_path / 'training.json').read_text())
    assert set(report['skipped']) == {'detector', 'segmentor'}
    assert not report['results']
    said = capsys.readouterr().out
    for folder in ('coco_tiny', 'camvid'):
        assert f'{tmp_path / folder} does not exist: put {folder}' in said


def test_a_task_that_raises_leaves_the_other(tmp_path, monkeypatch):
    def compare(task, args, scratch, finished):
        raise {'detector': RuntimeError, 'segmentor': gpu_train.Skipped}[task]('why')

    monkeypatch.setattr(gpu_train, 'compare', compare)
    assert gpu_train.main([str(tmp_path), '--smoke']) == 1
    report = json.loads((tmp_path / 'training.json').read_text())
    assert report['failed'] == dict(detector='RuntimeError: why')
    assert report['skipped'] == dict(segmentor='why')


def test_a_run_whose_other_half_crashes_is_kept(tmp_path, monkeypatch):
    def compare(task, args, scratch, finished):
        finished('convnext_mm', dict(final_loss=1.5))
        report = json.loads((tmp_path / 'training.json').read_text())
        assert report['unpaired'][task] == dict(convnext_mm=dict(final_loss=1.5))
        raise RuntimeError('why')

    monkeypatch.setattr(gpu_train, 'compare', compare)
    assert gpu_train.main([str(tmp_path), '--smoke', '--only', 'detector']) == 1
    report = json.loads((tmp_path / 'training.json').read_text())
    assert report['failed'] == dict(detector='RuntimeError: why')
    assert report['unpaired']['detector']['convnext_mm'] == dict(final_loss=1.5)


def test_a_slow_run_is_given_up(tmp_path):
    """It fails by name; it is not compared over fewer steps."""
    out = tmp_path / 'out'
    status = gpu_train.main(
        [
            str(out),
            '--smoke',
            '--only',
            'segmentor',
            '--data',
            str(tmp_path),
            '--limit',
            '0',
        ]
    )
    assert status == 1
    report = json.loads((out / 'training.json').read_text())
    assert report['results'] == {}
    assert '1 of 4 steps took' in report['failed']['segmentor']


def test_needs_a_gpu_without_smoke(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_train.torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        gpu_train.parse_args([str(tmp_path)])
    assert '--smoke tries everything on a CPU' in capsys.readouterr().err


@pytest.mark.parametrize('task', gpu_train.TASKS.values(), ids=gpu_train.TASKS)
def test_the_gpu_configs_train_what_they_say(task, shared_dir):
    """Tiny from scratch in mixed precision, without drop path."""
    args = gpu_train.parse_args(['out', '--smoke'])
    args.smoke, args.data = False, shared_dir / 'data'
    name = next(n for n, t in gpu_train.TASKS.items() if t is task)
    cfg = gpu_train.read_config(name, args, Path('scratch'))
    assert cfg.model.backbone.arch == 'tiny'
    assert not cfg.model.backbone.get('init_cfg')
    assert not cfg.model.backbone.get('drop_path_rate')
    assert cfg.optim_wrapper.type == 'convnext_mm.AmpOptimWrapper'
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval
    if name == 'detector':  # it is judged on what it was trained on
        assert (
            cfg.val_dataloader.dataset.ann_file == cfg.train_dataloader.dataset.ann_file
        )
        assert cfg.val_evaluator.ann_file.endswith('train2017.json')
