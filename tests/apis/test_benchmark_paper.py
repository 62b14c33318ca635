"""The paper's tables are measured beside what the paper says, and nothing of them is
left out without a word."""

import json

import pytest
import torch
from torch import nn

import benchmark
from convnext_mm import ConvNeXt
from convnext_mm.analysis import complexity
from convnext_mm.analysis.meter import Meter
from convnext_mm.apis.benchmark import (
    BLOCKS,
    PaperSettings,
    classifiers,
    networks,
    paper,
    published,
    tables,
)
from convnext_mm.engine.errors import ConfigError
from repo import ROOT

SMALL = ('--size', '64', '64', '--rounds', '2', '--batch', '1', '--arch', 'tiny')


@pytest.fixture(autouse=True)
def one_thread():
    """The benchmark sets the number of threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def few_boxes(monkeypatch):
    monkeypatch.setattr(complexity, 'NUM_PROPOSALS', 8)
    monkeypatch.setattr(complexity, 'NUM_DETECTIONS', 3)


def run(path, *arguments):
    benchmark.main(['--paper', *arguments, *SMALL, '--out', str(path)])
    return json.loads(path.read_text())


def quick(path, *arguments):
    return run(path, 'throughput', '--dtype', 'fp32', '--networks', *arguments)


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        benchmark.main([*arguments, '--out', 'never_written.json'])
    return capsys.readouterr().err + str(caught.value)


@pytest.fixture(params=['tests', 'shared'])
def facts(request, data_dir):
    if request.param == 'tests':
        path = data_dir / 'paper_tables.json'
    else:
        path = request.getfixturevalue('shared_dir') / 'reference/paper_tables.json'
        if not path.is_file():
            pytest.skip(f'{path} is missing')
    return json.loads(path.read_text())


def test_published_figures(facts):
    efficiency = facts['efficiency']
    of = {
        f'{published.LETTERS[arch]} {side}': row
        for (arch, side), row in published.THROUGHPUT.items()
    }
    ours = efficiency['a100_tf32_channels_last_images_per_s']
    assert {key: row.convnext for key, row in of.items()} == ours
    swin = {key: row.swin for key, row in of.items() if row.swin}
    assert swin == efficiency['a100_swin']

    fps = {}
    for (model, arch), row in published.FPS.items():
        letter = published.LETTERS[arch]
        pretrained = ' 22K' if arch in ('large', 'xlarge') else ''
        fps[f'{model} {letter}{pretrained}'] = row.convnext
        fps[f'{model} {letter} 22K' if row.convnext_22k else ''] = row.convnext_22k
        fps[f'{model} Swin-{letter}{pretrained}' if row.swin else ''] = row.swin
        fps[f'{model} ResNet-50' if row.resnet50 else ''] = row.resnet50
    assert fps.pop('') is None
    assert fps == efficiency['a100_fps_coco']

    ((key, memory),) = published.MEMORY.items()
    assert key == ('Cascade', 'base')
    batch = f'{published.MEMORY_BATCH} images per GPU'
    assert efficiency['train_memory_GB'] == {
        f'Cascade ConvNeXt-B, {batch}': memory.convnext,
        f'Cascade Swin-B, {batch}': memory.swin,
    }
    assert {row['name']: row['v100_images_per_s'] for row in facts['isotropic']} == {
        arch: row.convnext for arch, row in published.ISOTROPIC_THROUGHPUT.items()
    }
    assert {row['name']: row['train_memory_GB'] for row in facts['isotropic']} == {
        arch: row.convnext for arch, row in published.ISOTROPIC_MEMORY.items()
    }
    rates = {row['name']: row['drop_path'] for row in facts['isotropic']}
    assert rates == published.ISOTROPIC_DROP_PATH


def test_every_published_figure_has_a_case():
    cases = PaperSettings().cases()
    figures = [
        *published.THROUGHPUT.values(),
        *published.FPS.values(),
        *published.MEMORY.values(),
        *published.ISOTROPIC_THROUGHPUT.values(),
        *published.ISOTROPIC_MEMORY.values(),
    ]
    assert sorted(case.figures for case in cases) == sorted(figures)
    for case in cases:
        assert {'auto', 'paper'} < {*case.networks} or case.model == 'isotropic'
        assert ('swin' in case.networks) is bool(case.figures.swin)
    assert {case.block for case in cases} == {*BLOCKS}
    by_title = {(case.title, case.quantity): case for case in cases}
    assert len(by_title) == len(cases)
    assert by_title['Cascade T, 800 x 1280', 'images_per_s'].batch == 1
    assert by_title['Cascade B, 800 x 1280', 'peak_bytes'].batch == 2
    assert by_title['isotropic L, 224 x 224', 'peak_bytes'].batch == 32
    assert by_title['ConvNeXt-L, 384 x 384', 'images_per_s'].dtypes == ('fp32', 'bf16')


def test_another_size_has_nothing_published():
    cases = PaperSettings(size=(64, 96)).cases()
    assert {case.size for case in cases} == {(64, 96)}
    assert {case.figures for case in cases} == {None}
    assert len({(case.title, case.quantity) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--paper', 'troughput'], 'did you mean throughput'),
        (['--paper', '--networks', 'swim'], 'did you mean swin'),
        (['--paper', '--dtype', 'fp23'], 'did you mean fp32'),
        (['--paper', '--arch', 'atto'], '--arch atto: there are tiny'),
        (['--paper', '--mode', 'train'], '--mode and --paper'),
        (['--paper', '--fit-gib', '24'], '--fit-gib and --paper'),
        (['--paper', '--compile', 'auto'], '--compile and --paper'),
        (['--paper', '--plot', 'x.json'], '--plot and --paper'),
        (['--paper', '--batch', '0'], 'at least 1, not 0'),
        (['--paper', '--size', '16', '64'], '--size 16 64'),
        (['--paper', 'detectors', '--batch', '4'], 'detectors run on 1'),
        (['--paper', 'detectors', '--dtype', 'bf16'], 'it has arch tiny'),
        (['--paper', 'isotropic', '--networks', 'swin'], 'nothing is left'),
        (
            ['--paper', 'isotropic', '--networks', 'auto', 'swin'],
            '--networks swin: is in none',
        ),
        (
            ['--paper', 'isotropic', '--arch', 'small', 'tiny'],
            '--arch tiny: is in none',
        ),
        (['--paper', 'memory'], 'must see a GPU'),
        (['--arch', 'atto', 'tiny'], 'several are for --paper'),
        (['--mode', 'trian'], 'train'),
    ],
)
def test_bad_arguments(capsys, arguments, words):
    assert words in refusal(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_no_gpu(capsys):
    assert 'sees no GPU' in refusal(capsys, '--paper', '--device', 'cuda')


def test_out_in_no_folder(tmp_path):
    with pytest.raises(ConfigError, match='there is no folder'):
        paper.run_paper(PaperSettings(), tmp_path / 'none' / 'x.json', '')


@pytest.mark.slow
def test_throughput(tmp_path, capsys):
    for library in ('mmpretrain', 'torchvision'):
        pytest.importorskip(library)
    path = tmp_path / 'paper.json'
    result = run(path, 'throughput', '--dtype', 'fp32', 'bf16')
    assert [(row['dtype'], row['network']) for row in result['rows']] == [
        (dtype, network)
        for dtype in ('fp32', 'bf16')
        for network in ('auto', 'paper', 'mmpretrain', 'resnet50', 'swin')
    ]
    for row in result['rows']:
        assert row['row'] == 'ConvNeXt-T, 64 x 64' and row['batch'] == 1
        assert row['images_per_s'] == pytest.approx(1e3 / row['median_ms'])
        assert len(row['times_ms']) == 2
    assert result['fp32'] == 'plain fp32: a CPU has no TF32'
    assert 'convnext_mm' in result['versions'] and result['machine']['cpu']
    out = ' '.join(capsys.readouterr().out.split())
    assert ' 1.00 ' in out and 'a CPU has no TF32' in out and 'one A100' in out
    with pytest.raises(SystemExit, match='are not drawn'):
        benchmark.main(['--plot', str(path), '--out', str(tmp_path / 'plot.png')])


@pytest.mark.slow
def test_a_run_is_continued(tmp_path, monkeypatch):
    path = tmp_path / 'paper.json'
    first = quick(path, 'auto', 'paper')
    second = run(
        path, 'throughput', '--dtype', 'bf16', 'fp32', '--networks', 'auto', 'paper'
    )
    assert second['rows'][:2] == first['rows']  # not measured again
    assert [row['dtype'] for row in second['rows']] == ['fp32'] * 2 + ['bf16'] * 2
    assert len(second['commands']) == 2

    before = path.read_bytes()
    with pytest.raises(SystemExit, match="networks .'auto', 'paper'.*delete it"):
        quick(path, 'auto')
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='torch'):
        patch.setattr(paper, 'versions', lambda: {'torch': '0.1'})
        quick(path, 'auto', 'paper')
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match='Abacus'):
        facts = {**second['machine'], 'cpu': 'Abacus', 'load_average': 0}
        patch.setattr(paper, 'machine', lambda device: facts)
        quick(path, 'auto', 'paper')
    assert path.read_bytes() == before


def test_what_was_measured_before_a_kill_is_kept(tmp_path, monkeypatch):
    path = tmp_path / 'paper.json'
    times = Meter.times
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return times(*args)

    arguments = ('throughput', '--dtype', 'fp32', 'amp', '--networks', 'auto')
    with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017
        patch.setattr(Meter, 'times', killed)
        run(path, *arguments)
    assert [row['dtype'] for row in json.loads(path.read_text())['rows']] == ['fp32']
    result = run(path, *arguments)
    assert [row['dtype'] for row in result['rows']] == ['fp32', 'amp']


def test_another_file_is_not_overwritten(tmp_path):
    for content in ('{"rows": []}', 'no json', '[]'):
        path = tmp_path / 'other.json'
        path.write_text(content)
        with pytest.raises(SystemExit, match='holds no tables of --paper'):
            quick(path, 'auto')
        assert path.read_text() == content


def test_a_library_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(networks.PEER_MODULES, 'mmpretrain', 'no_such_package')
    rows = quick(tmp_path / 'paper.json', 'auto', 'mmpretrain')['rows']
    assert 'images_per_s' in rows[0]
    assert rows[1]['status'] == 'not installed'
    out = ' '.join(capsys.readouterr().out.split())
    assert "No module named 'no_such_package'" in out


def test_a_row_that_runs_out_of_memory(tmp_path, monkeypatch, capsys):
    """The others are measured, the run goes on, and does not end well."""
    forward = networks.Paper.forward

    def hungry(self, x):
        if x.shape[-2:] == (64, 64):  # not where networks are compared
            raise torch.OutOfMemoryError('CUDA out of memory. Tried 9 GiB')
        return forward(self, x)

    monkeypatch.setattr(networks.Paper, 'forward', hungry)
    path = tmp_path / 'paper.json'
    with pytest.raises(SystemExit, match='cells have no figure.*smaller --batch'):
        quick(path, 'auto', 'paper')
    ours, stock = json.loads(path.read_text())['rows']
    assert ours['images_per_s'] > 0
    assert stock['status'] == 'out of memory' and 'Tried 9 GiB' in stock['reason']
    assert 'images_per_s' not in stock
    assert 'out of memory' in capsys.readouterr().out


def test_out_of_memory_in_the_rounds(tmp_path, monkeypatch):
    def times(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(Meter, 'times', times)
    path = tmp_path / 'paper.json'
    with pytest.raises(SystemExit, match='2 cells have no figure'):
        quick(path, 'auto', 'paper')


def test_ours_that_differs_is_refused(tmp_path, monkeypatch):
    same = classifiers._same

    def broken(name, *args):
        network = same(name, *args)
        with torch.no_grad():
            network.head.bias.add_(name == 'auto')
        return network

    monkeypatch.setattr(classifiers, '_same', broken)
    with pytest.raises(SystemExit, match='auto and eager differ'):
        quick(tmp_path / 'paper.json', 'auto')


@pytest.mark.slow
def test_isotropic(tmp_path, capsys):
    path = tmp_path / 'paper.json'
    benchmark.main(
        [
            *('--paper', 'isotropic', '--arch', 'small', '--dtype', 'fp32'),
            *('--size', '64', '64', '--rounds', '2', '--batch', '1'),
            *('--out', str(path)),
        ]
    )
    rows = json.loads(path.read_text())['rows']
    assert [(row['quantity'], row['network']) for row in rows] == [
        (quantity, network)
        for quantity in ('images_per_s', 'peak_bytes')
        for network in ('auto', 'paper')
    ]
    assert all(row['images_per_s'] > 0 for row in rows[:2])
    assert {row['status'] for row in rows[2:]} == {'not measurable here'}
    assert "PyTorch's CUDA allocator" in ' '.join(capsys.readouterr().out.split())


def test_blocks_that_are_left_out_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper.PaperBench, 'rows', lambda self, case: iter([]))
    path = tmp_path / 'paper.json'
    benchmark.main(['--paper', '--arch', 'tiny', '--out', str(path)])
    out = capsys.readouterr().out
    assert 'memory: no row of it' in out and 'isotropic: no row of it' in out
    assert 'detectors: no row' not in out


@pytest.mark.parametrize('training', [True, False])
def test_the_papers_formulation(training):
    """Pooled, and with the samples that drop path skips."""
    model = ConvNeXt(
        'atto',
        out_indices=(1, 3),
        drop_path_rate=0.5,
        layer_scale_init_value=0.1,
        gap_before_final_norm=True,
        impl='eager',
    )
    x = torch.rand(4, 3, 64, 64)
    outs = []
    for network in (model, networks.Paper(model)):
        torch.manual_seed(1)
        outs.append(network.train(training)(x))
    assert [y.shape for y in outs[1]] == [(4, 80), (4, 320)]
    for ours, stock in zip(*outs):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_detectors(tmp_path, few_boxes, monkeypatch):
    pytest.importorskip('mmdet')
    from convnext_mm.apis.benchmark.detectors import Inference

    seen = []
    steps = Inference.step

    def spied(self, name):
        head = self.models[name].roi_head
        assert len(head.bbox_head) == 3
        for kind in ('bbox_head', 'mask_head'):
            for part in getattr(head, kind):
                part.register_forward_pre_hook(
                    lambda _, args, kind=kind: seen.append((kind, len(args[0])))
                )
        return steps(self, name)

    monkeypatch.setattr(Inference, 'step', spied)
    arguments = ['detectors', '--networks', 'auto', 'paper', 'swin', 'resnet50']
    monkeypatch.delitem(published.FPS, ('Mask R-CNN', 'tiny'))
    path = tmp_path / 'paper.json'
    benchmark.main(
        [
            *('--paper', *arguments, '--arch', 'tiny', '--size', '64', '64'),
            *('--rounds', '2', '--out', str(path)),
        ]
    )
    rows = json.loads(path.read_text())['rows']
    assert [row['network'] for row in rows] == ['auto', 'paper', 'swin', 'resnet50']
    assert all(row['images_per_s'] > 0 and row['batch'] == 1 for row in rows)
    # Whatever the random networks find.
    assert set(seen) == {('bbox_head', 8), ('mask_head', 3)}


@pytest.mark.slow
def test_detectors_without_mmpretrain(tmp_path, few_boxes, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.setitem(networks.PEER_MODULES, 'mmpretrain', 'no_such_package')
    monkeypatch.delitem(published.FPS, ('Cascade', 'tiny'))
    path = tmp_path / 'paper.json'
    benchmark.main(
        [
            *('--paper', 'detectors', '--networks', 'auto', 'mmpretrain'),
            *('--arch', 'tiny', '--size', '64', '64', '--rounds', '2'),
            *('--out', str(path)),
        ]
    )
    ours, theirs = json.loads(path.read_text())['rows']
    assert ours['row'] == 'Mask R-CNN T, 64 x 64' and ours['images_per_s'] > 0
    assert theirs['status'] == 'not installed'


@pytest.fixture
def gpu_bench(monkeypatch):
    """Peaks as on a GPU, of networks on the CPU: what a network owns."""

    def peak(self, step, own):
        step.run()
        step.reset()
        return own

    monkeypatch.setattr(Meter, 'peak', peak)
    return paper.PaperBench(PaperSettings(rounds=2))


def test_memory_of_isotropic(gpu_bench):
    case = next(c for c in PaperSettings().cases() if c.block == 'isotropic')
    case = case._replace(size=(32, 32), batch=2)
    found = {name: gpu_bench._peak(case, name, 'fp32') for name in case.networks}
    assert found['auto'] == found['paper']
    # 22 M parameters in fp32; states of the optimizer on a CPU do not count.
    assert found['auto']['peak_bytes'] == pytest.approx(4 * 22e6, rel=0.03)


@pytest.mark.slow
def test_memory_of_a_detector(gpu_bench, monkeypatch):
    for package in ('mmdet', 'mmpretrain'):
        pytest.importorskip(package)
    from convnext_mm.apis.benchmark import models

    read_config = models.read_config

    def with_few_samples(*args):
        cfg = read_config(*args)
        cfg.model.train_cfg.rpn_proposal.max_per_img = 8
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.num = 4
        return cfg

    monkeypatch.setattr(models, 'read_config', with_few_samples)
    (case,) = (c for c in PaperSettings().cases() if c.block == 'memory')
    assert case.dtypes == ('amp',)
    case = case._replace(arch='tiny', size=(64, 64))
    # Its parameters, as the papers give them: 86 M.
    for name in ('auto', 'mmpretrain', 'paper', 'swin'):
        found = gpu_bench._peak(case, name, 'fp32')
        assert 'status' not in found, found
        assert found['peak_bytes'] == pytest.approx(4 * 86e6, rel=0.01), name


def test_memory_that_is_not_enough(gpu_bench, monkeypatch):
    def peak(self, step, own):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(Meter, 'peak', peak)
    case = next(c for c in PaperSettings().cases() if c.block == 'isotropic')
    case = case._replace(size=(32, 32), batch=2)
    assert gpu_bench._peak(case, 'auto', 'fp32')['status'] == 'out of memory'


def test_swin_runs_in_16_bit():
    """MMPretrain's mask of windows is fp32, which its products refuse."""
    pytest.importorskip('mmpretrain')
    built = classifiers.build_classifiers(['swin'], 'tiny', 'cpu', 224).built
    network = built['swin'].bfloat16().eval()
    with torch.no_grad():
        outs = network(torch.rand(1, 3, 64, 64, dtype=torch.bfloat16))
    assert outs.shape == (1, classifiers.NUM_CLASSES) and outs.isfinite().all()


@pytest.mark.parametrize('side, window', [(224, 7), (384, 12), (64, 7)])
def test_windows_of_swin(side, window):
    pytest.importorskip('mmpretrain')
    swin = classifiers._other('swin', 'tiny', side).backbone
    windows = {m.window_size for m in swin.modules() if hasattr(m, 'w_msa')}
    assert windows == {window}


def test_classifier_pools_maps():

    class Backbone(nn.Module):
        def forward(self, x):
            return [x[..., :2], x]

    network = classifiers.Classifier(Backbone(), 3)
    maps = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(network(maps), network.head(maps.mean((2, 3))))


def test_cells():
    figures = published.Figures(11.4, 10.7, 16.2, 11.5)
    row = dict(
        block='detectors',
        row='Cascade B',
        quantity='images_per_s',
        dtype='fp32',
        batch=1,
        published=figures._asdict(),
    )
    result = dict(
        fp32='TF32',
        rows=[
            dict(row, network='swin', images_per_s=8.0),
            dict(row, network='auto', images_per_s=30.0),
            dict(row, network='mmpretrain', images_per_s=20.0),
            dict(row, network='paper', status='out of memory', reason='X: y'),
        ],
    )
    (table,) = tables.tables(result)
    assert [c.header for c in table.columns[1:]] == [
        'network',
        'images/s',
        'over stock',
        'published',
        'over ConvNeXt',
    ]
    assert [*zip(*(c.cells for c in table.columns))] == [
        ('Cascade B', 'Swin', '8', '0.40', '10.7', '0.94'),
        ('batch 1, fp32', 'auto (ours)', '30.0', '1.50', '11.4, 22K 11.5', '1.00'),
        ('', 'mmpretrain', '20.0', '1.00', '11.4, 22K 11.5', '1.00'),
        ('', 'paper', 'out of memory', '', '11.4, 22K 11.5', '1.00'),
    ]
    assert 'fp32 is TF32' in table.caption
    for line in result['rows']:
        line['dtype'] = 'bf16'  # of which the paper has nothing
    (table,) = tables.tables(result)
    assert set(table.columns[4].cells) == {''}
    assert 'TF32' not in table.caption.split('Published')[0]
    (problem,) = tables.problems(result)
    assert problem == 'paper: out of memory (Cascade B bf16): X: y'


def test_the_page_has_the_files_figures():
    result = json.loads((ROOT / 'benchmarks' / 'paper_cpu.json').read_text())
    page = (ROOT / 'docs' / 'performance.md').read_text()
    cases = {}
    for row in result['rows']:
        if row['quantity'] == 'images_per_s':
            case = f'| {row["row"].split(",")[0]} | {row["dtype"]} |'
            cases.setdefault(case, {})[row['network']] = row['images_per_s']
    assert len(cases) > 5
    for case, speeds in cases.items():
        (line,) = (line for line in page.splitlines() if line.startswith(case))
        assert line[len(case) :].strip(' |').replace(' |  | ', ' | ').split(' | ') == [
            f'{speeds[name] / speeds["paper"]:.2f}'
            for name in result['settings']['networks']
            if name in speeds and name != 'paper'
        ]
