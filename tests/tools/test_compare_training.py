"""The parity script on a few steps."""

import json

import pytest

from repo import ROOT, load_tool

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)


@pytest.fixture(scope='module')
def script():
    return load_tool('maintenance/compare_training')


@pytest.mark.slow
def test_few_steps_agree(script, shared_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, plot = tmp_path / 'out.json', tmp_path / 'docs' / 'plot.png'
    arguments = [
        '--data',
        str(shared_dir / 'data'),
        '--steps',
        '3',
        '--out',
        str(out),
        '--plot',
        str(plot),
    ]
    assert script.main(arguments) == 0
    results = json.loads(out.read_text())
    assert set(results) == {'detector', 'segmentor'}
    for result in results.values():
        for run in result['losses'].values():
            assert len(run) == 3
        assert (
            result['largest_relative_deviation']
            == max(result['relative_deviation'])
            < 1e-3
        )
    assert plot.stat().st_size > 10_000
    arguments += ['--tolerance', '-1', '--tasks', 'segmentor', '--steps', '1']
    assert script.main(arguments) == 1


def test_missing_data_is_named(script, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match='coco_tiny'):
        script.main(['--data', str(tmp_path)])


def test_published_results_agree():
    """What the repository holds is within the tolerance at every step."""
    path = ROOT / 'benchmarks' / 'training_parity.json'
    for result in json.loads(path.read_text()).values():
        assert len(result['relative_deviation']) == 50
        assert max(result['relative_deviation']) <= 1e-3
        ours, theirs = (
            result['losses'][name] for name in ('convnext_mm', 'mmpretrain')
        )
        for a, b, deviation in zip(ours, theirs, result['relative_deviation']):
            assert abs(a['loss'] - b['loss']) / b['loss'] == pytest.approx(
                deviation, abs=1e-9
            )
