"""``tools/train.py --profile``, on a CPU."""

import gzip
import json
import re

import pytest

from convnext_mm.datasets import write_shapes
from convnext_mm.engine.hooks.profile_hook import StepProfilerHook
from repo import FEW_ITERATIONS, SHAPES, free_port, run, tool
from warm_python import warm_python

SEGMENTOR = 'configs/demo/upernet_convnext-atto_shapes.py'


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes')
    write_shapes(path, num_train=8, num_val=2, size=64)
    return path


def check_files(folder, rank, steps):
    """The trace holds every profiled step, the table's shares add up."""
    with gzip.open(folder / f'rank{rank}_trace.json.gz', 'rt') as file:
        events = json.load(file)['traceEvents']
    marked = {
        e['name'] for e in events if e.get('name', '').startswith('ProfilerStep#')
    }
    assert len(marked) == steps
    table = (folder / f'rank{rank}_costs.txt').read_text()
    rows = [re.split(r'\s{2,}', line.strip()) for line in table.splitlines()]
    rows = [row for row in rows if row[-1].isdigit()]
    calls = {row[0]: int(row[-1]) for row in rows}
    assert any('lean_backward' in name for name in calls)
    shares = [float(row[1].rstrip('%')) for row in rows]
    assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100
    return table


@pytest.mark.slow
def test_detector(shapes, tmp_path):
    said = tool(
        'train',
        SHAPES,
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path,
        '--profile',
        2,
        '--cfg-options',
        *FEW_ITERATIONS,
    )
    table = check_files(tmp_path / 'profile', 0, 2)
    assert table in said
    assert f'Profiled 2 step(s); traces and tables are in {tmp_path}' in said
    # It ended after them, before the run's last iteration and validation.
    assert not (tmp_path / 'iter_6.pth').exists() and 'mAP' not in said


@pytest.mark.slow
def test_segmentor_in_two_processes(shapes, tmp_path):
    said = run(
        'bash',
        'tools/dist_train.sh',
        SEGMENTOR,
        2,
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path,
        '--profile',
        1,
        '--cfg-options',
        *FEW_ITERATIONS,
        'model.data_preprocessor.size=(64,64)',
        port=free_port(),
        python=warm_python(),
    )
    for rank in range(2):
        check_files(tmp_path / 'profile', rank, 1)
    assert said.count('Profiled 1 step(s)') == 1


@pytest.mark.slow
def test_too_few_steps_are_named(shapes, tmp_path):
    with pytest.raises(ValueError, match='at least 1, got 0'):
        StepProfilerHook(steps=0)
    said = tool('train', SHAPES, '--data-root', shapes, '--profile', '0', check=False)
    assert said.startswith('error: --profile takes a number of steps from 1')

    class ShortRun:
        max_iters, work_dir = 4, tmp_path

    with pytest.raises(
        ValueError, match='2 steps of warm-up and 3 to record; training has 4'
    ):
        StepProfilerHook(steps=3, warmup=2).before_run(ShortRun)
