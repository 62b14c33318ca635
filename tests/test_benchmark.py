"""The benchmark runs, checks what it compares, and its results can be drawn."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(
        f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark, plot_benchmark = tool('benchmark'), tool('plot_benchmark')


@pytest.fixture
def threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def run(path, *arguments):
    benchmark.main(['--arch', 'atto', '--size', '64', '64', '--batch', '1',
                    '--rounds', '2', '--out', str(path), *arguments])
    return json.loads(path.read_text())


def test_results_and_plot(tmp_path, threads):
    path = tmp_path / 'result.json'
    result = run(path, '--networks', 'paper', 'eager', 'lean', 'lean+deploy')
    assert result['command'].startswith('python tools/benchmark.py --arch')
    assert result['machine']['threads'] == 1
    assert torch.__version__.startswith(result['versions']['torch'])
    # Inference, training and memory, in three dtypes.
    assert len(result['rows']) == 3 * (4 + 3 + 3)
    saved = {r['network']: r['saved_bytes'] for r in result['rows']
             if r['mode'] == 'memory' and r['dtype'] == 'fp32'}
    assert saved['lean'] < saved['eager'] < saved['paper']
    for row in result['rows']:
        if row['mode'] != 'memory':
            low, high = row['quartiles_ms']
            assert 0 < low <= row['median_ms'] <= high
            assert 0 < row['floor_ms']
    plot_benchmark.main([str(path), '--out', str(tmp_path / 'plot.png')])
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


def test_peers_get_the_same_weights(tmp_path, threads):
    for library in ('mmpretrain', 'timm', 'torchvision', 'transformers'):
        pytest.importorskip(library)
    run(tmp_path / 'result.json', '--mode', 'memory', '--dtype', 'fp32')


def test_different_networks_are_refused(monkeypatch, tmp_path, threads):
    build = benchmark.build

    def broken(args):
        networks = build(args)
        with torch.no_grad():
            networks['lean'].norm3.bias.add_(1)
        return networks

    monkeypatch.setattr(benchmark, 'build', broken)
    with pytest.raises(SystemExit, match='lean and eager differ'):
        run(tmp_path / 'result.json', '--networks', 'eager', 'lean')


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / 'x.json', '--clock', 'cpu', '--threads', '2')
    assert '--threads 1' in capsys.readouterr().err
    other = tmp_path / 'other.json'
    other.write_text('{}')
    with pytest.raises(SystemExit, match='no result'):
        plot_benchmark.main([str(other), '--out', str(tmp_path / 'x.png')])
