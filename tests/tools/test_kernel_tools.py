"""What counts and times the kernels without a GPU runs, and counts right."""

import json
import subprocess
import sys

import pytest

from convnext_mm.ops import triton
from repo import ROOT

pytest.importorskip('triton', minversion=triton.MIN_TRITON)


def run(tool, out, *options):
    command = [sys.executable, f'tools/maintenance/{tool}.py', str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return json.loads(out.read_text())


def test_work_is_counted(tmp_path):
    """Multiply-adds of a depthwise convolution are what its map says, with the rows
    above and below each strip; bytes are those of the maps."""
    n, height, width, channels = 2, 40, 48, 96
    found = run(
        'count_work', tmp_path / 'work.json', '--sm', '90', '--map', '2', '40', '48'
    )
    by_step = {}
    for record in found['records']:
        by_step.setdefault((record['direction'], record['launch']), []).append(record)
    (forward,) = by_step['forward', 'depthwise_kernel']
    values = n * height * width * channels
    taps = 4 * (49 + 1) * channels
    assert forward['bytes'] == (4 + 2 + 2) * values + taps
    lanes = forward['warp_instructions'] * 32
    # A small map's strips are low, with many rows above and below.
    assert 49 * values < lanes / forward['per_multiply_add'] < 5 * 49 * values
    for record in found['records']:
        if 'depthwise' in record['launch']:
            assert record['per_multiply_add'] < 2
        if 'registers' in record:
            assert record['registers'] < 255
    assert len(by_step['forward', 'linear_kernel']) == 2
    assert {r['step'] for r in found['records']} >= {'W1, GELU', 'depthwise weight'}


def test_host_is_timed(tmp_path):
    pytest.importorskip('mmpretrain')
    found = run('host_time', tmp_path / 'host.json', '--rounds', '2', '--blocks', '2')
    networks = {r['network']: r for r in found['records']}
    assert set(networks) == {'ours', 'mmpretrain'}
    assert networks['ours']['dispatches'] < networks['mmpretrain']['dispatches']
    assert all(r['forward_us'] > 0 and r['backward_us'] > 0 for r in networks.values())


@pytest.mark.slow
def test_streams_are_compared(tmp_path):
    """A stream in bf16 is further from fp64 than autocast's fp32, a pair is not."""
    found = run(
        'measure_residual_stream',
        tmp_path / 'stream.json',
        *('--arch', 'atto', '--size', '64'),
    )
    errors = {
        r['stream']: r['errors'][-1] for r in found['rows'] if r['layer_scale'] == 1
    }
    assert errors['bf16'] > 1.05 * errors['fp32']
    assert errors['pair'] == pytest.approx(errors['fp32'], rel=0.05)
