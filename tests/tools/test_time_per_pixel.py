import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from repo import load_tool


@pytest.fixture
def tool(monkeypatch):
    tool = load_tool('maintenance/time_per_pixel')
    monkeypatch.setattr(tool, 'SIZES', ((32, 32), (33, 64)))
    monkeypatch.setattr(tool, 'BATCHES', (1, 2))
    monkeypatch.setattr(tool, 'REFERENCE', (1, 32, 48))
    threads = torch.get_num_threads()
    yield tool
    torch.set_num_threads(threads)


def test_rows_and_picture(tool, tmp_path, capsys):
    out, picture = tmp_path / 'out.json', tmp_path / 'out.png'
    assert tool.main(['--out', str(out), '--rounds', '2', '--largest', '4000']) == 0
    result = json.loads(out.read_text())
    shapes = {tuple(row['shape']) for row in result['rows']}
    assert shapes == {(1, 32, 32), (2, 32, 32), (1, 33, 64)}
    cases = {(row['mode'], row['network']) for row in result['rows']}
    assert cases == {
        *(('train', 'eager'), ('train', 'auto')),
        *(('infer', 'eager'), ('infer', 'auto+deploy')),
    }
    for row in result['rows']:
        assert len(row['us_per_pixel']) == len(row['reference_us_per_pixel']) == 2
        assert row['of_reference'] > 0
    assert 'train eager (2, 33, 64)' in result['left_out']
    assert 'left out: infer auto+deploy (2, 33, 64)' in capsys.readouterr().out
    assert result['machine']['threads'] == 1
    assert tool.main(['--plot', str(out), '--out', str(picture)]) == 0
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_large_ones_take_every_second_turn(tool, monkeypatch):
    monkeypatch.setattr(tool, 'LARGE', 2000)
    small, large = (tool.Case('infer', 'eager', (1, 32, n)) for n in (32, 64))
    assert [*tool.turns([small, large], 3)] == [small, large, small, small, large]


KEEP = dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='100000000000')
PAGES = """
import resource
for number in range(9):
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b'1') * (64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='is about glibc')
def test_memory_is_kept():
    """What docs/performance.md advises does what it says."""

    def new_pages(variables):
        return int(
            subprocess.run(
                [sys.executable, '-c', PAGES],
                env={**os.environ, **variables},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )

    assert 100 * new_pages(KEEP) < new_pages({})
