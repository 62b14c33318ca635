"""The benchmark runs, checks what it compares, and its results can be drawn."""

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import make_benchmark_tables
from convnext_mm import ConvNeXt
from convnext_mm.analysis import complexity
from convnext_mm.analysis.floor import Rates, backbone_cost
from convnext_mm.analysis.meter import Meter, Step
from convnext_mm.apis.benchmark import Settings, bench, capacity, models, networks, plot
from repo import ROOT

SMALL = ['--arch', 'atto', '--size', '64', '64', '--rounds', '2']


@pytest.fixture(autouse=True)
def one_thread():
    """The benchmark sets the number of threads."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Rates measured in milliseconds."""
    monkeypatch.setattr('convnext_mm.analysis.floor.MATRIX_SIZE', dict(cpu=256))
    monkeypatch.setattr('convnext_mm.analysis.floor.COPY_VALUES', dict(cpu=2**20))


def num_parameters():
    return sum(p.numel() for p in ConvNeXt('atto').parameters())


@pytest.fixture
def small_heads(monkeypatch, tmp_path):
    """The configs of whole models, with heads that a CPU runs in seconds."""
    few = 'rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=16))'
    monkeypatch.setattr(complexity, 'NUM_PROPOSALS', 20)
    monkeypatch.setattr(complexity, 'NUM_DETECTIONS', 4)
    for task, model in dict(
        detector=f'train_cfg=dict({few})',
        segmentor='decode_head=dict(channels=32), auxiliary_head=dict(channels=32)',
    ).items():
        path = tmp_path / f'small_{task}.py'
        base = str(ROOT / models.CONFIGS[task])
        path.write_text(f'_base_ = {base!r}\nmodel = dict({model})\n')
        monkeypatch.setitem(models.CONFIGS, task, path)


def run(path, *arguments):
    benchmark.main([*SMALL, '--out', str(path), *arguments])
    return json.loads(path.read_text())


def refusal(capsys, *arguments):
    """What the benchmark says to arguments that it refuses."""
    with pytest.raises(SystemExit) as caught:
        benchmark.main([*arguments, '--out', 'never_written.json'])
    return capsys.readouterr().err + str(caught.value)


@pytest.mark.slow
def test_results_and_plot(tmp_path):
    path = tmp_path / 'result.json'
    result = run(
        path, '--batch', '1', '--networks', 'paper', 'eager', 'lean', 'lean+deploy'
    )
    assert result['command'].startswith('convnext-mm bench --arch')
    assert result['machine']['threads'] == 1
    assert torch.__version__.startswith(result['versions']['torch'])
    assert {c['parameters'] for c in result['costs'].values()} == {num_parameters()}
    # Inference, training and memory, in three dtypes.
    assert len(result['rows']) == 3 * (4 + 3 + 3)
    saved = {
        r['network']: r['saved_bytes']
        for r in result['rows']
        if r['mode'] == 'memory' and r['dtype'] == 'fp32'
    }
    assert saved['lean'] < saved['eager'] < saved['paper']
    rates = result['rates']
    for row in result['rows']:
        if row['mode'] == 'memory':
            continue
        lean = row['network'].startswith('lean')
        assert row['implementation'] == ('lean' if lean else 'plain')
        low, high = row['quartiles_ms']
        assert 0 < low <= row['median_ms'] <= high
        cost = result['costs'][f'{row["mode"]}, {row["dtype"]}']
        rate = rates['matrix_flops_per_s'][
            'float32' if row['dtype'] == 'fp32' else 'bfloat16'
        ]
        assert row['floor_ms'] == pytest.approx(
            1e3
            * max(
                cost['matrix_flops'] / rate, cost['least_bytes'] / rates['bytes_per_s']
            )
        )
        assert row['share_of_floor'] == pytest.approx(
            row['floor_ms'] / row['median_ms']
        )
    assert result['skipped'] == {}
    benchmark.main(['--plot', str(path), '--out', str(tmp_path / 'plot.png')])
    assert (tmp_path / 'plot.png').stat().st_size > 10_000


@pytest.mark.parametrize('arch', ['atto', 'tiny'])
@pytest.mark.parametrize('size', [(64, 96), (70, 52)])
def test_flops_are_what_pytorch_counts(arch, size):
    cost = backbone_cost(arch, 2, size, 'infer', 2)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        model = ConvNeXt(arch, impl='eager')
        model(torch.rand(2, 3, *size))
    assert cost.matrix_flops + cost.depthwise_flops == counter.get_total_flops()


def test_cost_of_the_published_case():
    """ConvNeXt-T, a train step at 2 x 3 x 800 x 1344 in 16 bit: 1.15 TFLOP,
    3 x 4.5 G multiply-adds of them depthwise; 118 C bytes for each pixel and
    block."""
    cost = backbone_cost('tiny', 2, (800, 1344), 'train', 2)
    assert cost.matrix_flops + cost.depthwise_flops == pytest.approx(1.15e12, rel=0.01)
    assert cost.depthwise_flops == pytest.approx(2 * 3 * 4.5e9, rel=0.01)
    pixels = 2 * 200 * 336
    assert cost.least_bytes == 118 * (
        pixels * 3 * 96
        + pixels // 4 * 3 * 192
        + pixels // 16 * 9 * 384
        + pixels // 64 * 3 * 768
    )


def test_the_slower_limit_is_the_floor(monkeypatch):
    rates = Rates('cpu', Meter('cpu').now)
    monkeypatch.setattr(rates, 'matrix', lambda dtype: 790e12)
    monkeypatch.setattr(rates, 'bandwidth', lambda: 4.3e12)
    assert rates.floor_ms(1.15e12, 11e9, torch.bfloat16) == pytest.approx(
        2.56, abs=0.01
    )
    assert rates.floor_ms(7.9e12, 11e9, torch.bfloat16) == pytest.approx(10)


@pytest.mark.slow
def test_rates_are_of_this_machine():
    rates = Rates('cpu', Meter('cpu').now)
    assert 1e8 < rates.matrix(torch.float32) < 1e14
    assert 1e7 < rates.bandwidth() < 1e13
    assert rates.measured() == dict(
        matrix_flops_per_s=dict(float32=rates.matrix(torch.float32)),
        bytes_per_s=rates.bandwidth(),
    )


def test_steps_take_turns():
    turns = []
    steps = {
        name: Step(
            lambda name=name: turns.append(name),
            lambda name=name: turns.append(f'{name} reset'),
        )
        for name in 'ab'
    }
    results = Meter('cpu').times(steps, rounds=2, warmup=1)
    assert turns == ['a', 'a reset', 'b', 'b reset'] * 3
    assert len(results['a']['times_ms']) == 2


def test_16_bit_keeps_half(tmp_path):
    result = run(
        tmp_path / 'result.json',
        '--mode',
        'memory',
        '--dtype',
        'fp16',
        'fp32',
        'bf16',
        'amp-fp16',
        '--networks',
        'eager',
        'lean',
    )
    saved = {(r['network'], r['dtype']): r['saved_bytes'] for r in result['rows']}
    for network in ('eager', 'lean'):
        whole = saved[network, 'fp32']
        assert saved[network, 'fp16'] == saved[network, 'bf16']
        assert saved[network, 'fp16'] == pytest.approx(whole / 2, rel=0.05)
    # The residual stream stays in fp32 under autocast. (Eager keeps 16-bit
    # copies of the weights, too.)
    assert saved['lean', 'fp16'] < saved['lean', 'amp-fp16'] < saved['lean', 'fp32']


def test_peers_get_the_same_weights(tmp_path):
    for library in networks.PEER_MODULES:
        pytest.importorskip(library)
    result = run(tmp_path / 'result.json', '--mode', 'memory', '--dtype', 'fp32')
    assert result['skipped'] == {}
    assert {r['network'] for r in result['rows']} >= {*networks.PEERS}


def test_peers_that_are_missing_or_differ_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(networks.PEER_MODULES, 'timm', 'no_such_package')
    monkeypatch.setattr(
        networks.Paper,
        'norm',
        staticmethod(lambda x, norm: torch.full_like(x, float('nan'))),
    )
    result = run(
        tmp_path / 'result.json',
        '--mode',
        'memory',
        '--dtype',
        'fp32',
        '--networks',
        'timm',
        'paper',
        'eager',
    )
    assert [r['network'] for r in result['rows']] == ['eager']
    assert result['skipped'] == dict(
        timm="ModuleNotFoundError: No module named 'no_such_package'",
        paper='paper and eager differ by inf of the largest value, more than 1e-04',
    )
    assert 'skipped timm: ModuleNotFoundError' in capsys.readouterr().out


def test_whole_models_without_mmpretrain(monkeypatch):
    pytest.importorskip('mmseg')
    monkeypatch.setitem(networks.PEER_MODULES, 'mmpretrain', 'no_such_package')
    settings = Settings(mode=['segmentor'])
    monkeypatch.setattr(bench.ModelBench, '_models', lambda *_: None)
    monkeypatch.setattr(bench.ModelBench, '_timed', lambda *_: None)
    models = bench.ModelBench(settings, Meter('cpu'), None, lambda: None)
    models.measure()
    assert models.names == ['auto'] and settings.size == (512, 512)
    assert 'no_such_package' in models.skipped['mmpretrain']


def test_different_networks_of_ours_are_refused(monkeypatch, tmp_path):
    build_ours = networks.build_ours

    def broken(*args):
        network = build_ours(*args)
        with torch.no_grad():
            network.norm3.bias.add_(1)
        return network

    monkeypatch.setattr(networks, 'build_ours', broken)
    with pytest.raises(SystemExit, match='lean and eager differ'):
        run(tmp_path / 'result.json', '--networks', 'lean')


@pytest.mark.slow
def test_compiled_networks_take_part(tmp_path):
    pytest.importorskip('timm')
    result = run(
        tmp_path / 'result.json',
        '--mode',
        'train',
        '--dtype',
        'fp32',
        '--networks',
        'timm',
        'lean',
        '--compile',
        'timm',
        'lean',
        '--compile-backend',
        'aot_eager',
    )
    assert result['skipped'] == {}
    assert {r['network']: r['implementation'] for r in result['rows']} == {
        'timm': 'plain',
        'lean': 'lean',
        'timm compiled': 'plain',
        'lean compiled': 'lean',
    }
    # Forward and backward are counted in compiled code too.
    plain, compiled = (r['operators'] for r in result['rows'][1::2])
    assert plain == compiled and plain['lean_backward'] == 12


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['raises', 'is wrong'])
def test_a_network_that_does_not_compile_is_named(tmp_path, monkeypatch, fault):

    class Compiled(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            if fault == 'raises':
                raise RuntimeError('no kernel\nand a long story')
            return [y + 1 for y in self.network(x)]

    monkeypatch.setattr(torch, 'compile', lambda model, **_: Compiled(model))
    result = run(
        tmp_path / 'result.json',
        '--mode',
        'infer',
        '--dtype',
        'fp32',
        '--networks',
        'eager',
        '--compile',
        'eager',
    )
    assert [r['network'] for r in result['rows']] == ['eager']
    reason = result['skipped']['eager compiled, infer, fp32']
    assert (
        reason == 'RuntimeError: no kernel'
        if fault == 'raises'
        else 'of the largest value from plain PyTorch' in reason
    )


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detector', 'segmentor'])
def test_whole_models(task, tmp_path, small_heads):
    for package in ('mmcv.ops', 'mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    path = tmp_path / 'result.json'
    result = run(path, '--mode', task, '--warmup', '0')
    ours, theirs = result['rows']
    assert (ours['network'], theirs['network']) == ('auto', 'mmpretrain')
    for row in result['rows']:
        assert (row['mode'], row['dtype']) == (task, 'fp32')
        assert len(row['times_ms']) == 2 and row['share_of_floor'] > 0
    cost = result['costs'][f'{task}, fp32']
    backbone = backbone_cost('atto', 2, (64, 64), 'train', 4)
    assert cost['parameters'] > num_parameters()
    assert cost['matrix_flops'] > backbone.matrix_flops
    assert cost['least_bytes'] == backbone.least_bytes
    benchmark.main(['--plot', str(path), '--out', str(tmp_path / 'plot.png')])
    assert (tmp_path / 'plot.png').stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detector', 'segmentor'])
def test_whole_models_look_at_images(task, tmp_path, small_heads):
    for package in ('mmcv.ops', 'mmdet', 'mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    names = ['lean', 'lean+deploy', 'paper', 'mmpretrain', 'resnet50', 'swin']
    path = tmp_path / 'result.json'
    benchmark.main(
        [
            *('--mode', f'{task}-infer', '--size', '64', '64', '--out', str(path)),
            *('--rounds', '2', '--warmup', '0', '--networks', *names),
        ]
    )
    result = json.loads(path.read_text())
    assert result['skipped'] == {} and result['batch'] == 2
    rows = {row['network']: row for row in result['rows']}
    assert [*rows] == names
    for row in rows.values():
        assert row['images_per_s'] == pytest.approx(2e3 / row['median_ms'])
    assert [row['implementation'] for row in rows.values()] == ['lean'] * 2 + [
        'plain'
    ] * 4


def test_what_ran_is_not_what_was_asked_for(tmp_path, monkeypatch):
    """It has no row, and the others have theirs."""
    from convnext_mm.models import block

    monkeypatch.setitem(block.IMPLEMENTATIONS, 'triton', block.IMPLEMENTATIONS['lean'])
    monkeypatch.setattr(block.triton, 'why_not', lambda x: None)
    with pytest.raises(SystemExit, match='triton, infer, fp32 of this package'):
        run(
            *(tmp_path / 'result.json', '--mode', 'infer', '--dtype', 'fp32'),
            *('--networks', 'triton', 'eager'),
        )
    result = json.loads((tmp_path / 'result.json').read_text())
    assert [row['network'] for row in result['rows']] == ['eager']
    reason = result['skipped']['triton, infer, fp32']
    assert 'triton was asked for, and lean ran' in reason


def test_some_blocks_are_not_all():
    network = ConvNeXt('atto', impl='lean')
    ran = networks.what_runs(lambda: network(torch.rand(1, 3, 32, 32)))
    networks.check_what_ran('lean', network, ran)
    few = ran._replace(operators={**ran.operators, 'lean_forward': 11})
    with pytest.raises(RuntimeError, match='of 12 blocks in 11 only'):
        networks.check_what_ran('lean', network, few)


@pytest.mark.parametrize('fault', ['raises', 'gives NaN', 'has no gradient'])
def test_a_wrong_step_is_skipped(fault, tmp_path, monkeypatch):
    """Of the benchmark's shape and dtype, after a check of a small one passed."""
    forward = networks.Paper.forward

    def broken(self, x):
        maps = forward(self, x)
        if x.shape[-1] != 64:
            return maps
        if fault == 'raises':
            raise RuntimeError('of this size')
        factor = float('nan') if fault == 'gives NaN' else 1
        return [y.detach() * factor + 0 * y for y in maps]

    monkeypatch.setattr(networks.Paper, 'forward', broken)
    result = run(
        *(tmp_path / 'result.json', '--mode', 'train', '--dtype', 'fp32'),
        *('--networks', 'paper', 'eager'),
    )
    assert [row['network'] for row in result['rows']] == ['eager']
    assert [*result['skipped']] == ['paper, train, fp32']


def test_rows_are_there_when_it_ends_early(tmp_path, monkeypatch):
    """With the name of what was running then."""
    step = bench.BackboneBench._step

    def dying(self, network, mode, dtype):
        if mode == 'train':
            raise KeyboardInterrupt
        return step(self, network, mode, dtype)

    monkeypatch.setattr(bench.BackboneBench, '_step', dying)
    path = tmp_path / 'result.json'
    settings = Settings(
        **dict(mode=['infer', 'train'], dtype=['fp32'], arch='atto', size=(64, 64)),
        **dict(networks=['eager'], rounds=2, warmup=0),
    )
    with pytest.raises(KeyboardInterrupt):
        bench.run(settings, path, '')
    result = json.loads(path.read_text())
    assert [row['mode'] for row in result['rows']] == ['infer']
    assert result['running'] == 'eager, train, fp32'


@pytest.mark.slow
def test_both_backbones_give_the_same_loss(small_heads):
    for package in ('mmseg', 'mmpretrain'):
        pytest.importorskip(package)
    from convnext_mm.apis.benchmark.models import Training

    training = Training(
        'segmentor', ['mmpretrain', 'lean'], 'atto', 2, (64, 96), 'fp32', 'cpu'
    )
    assert [*training.models] == ['lean', 'mmpretrain']
    losses = {name: training.loss(name).item() for name in training.models}
    assert losses['lean'] == pytest.approx(losses['mmpretrain'], rel=1e-5)
    groups = {
        name: len(wrapper.param_groups)
        for name, wrapper in training.optim_wrappers.items()
    }
    assert groups['lean'] == groups['mmpretrain'] > 1
    assert all(model.backbone.training for model in training.models.values())
    weight = training.models['lean'].backbone.stages[0][0].dwconv.weight
    before = weight.detach().clone()
    training.step('lean').run()
    assert not torch.equal(weight, before)  # the optimizer took part
    with pytest.raises(ValueError, match='the maps of mmpretrain and lean'):
        training.check_equal()


@pytest.mark.parametrize('most', [0, 1, 5, 9])
@pytest.mark.parametrize('guess', [-3, 1, 4, 12])
def test_largest_batch(most, guess):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    assert capacity.largest_batch(fits, guess) == most
    assert len(tried) <= abs(most - max(guess, 1)) + 3


def test_each_trial_of_a_batch_is_written(tmp_path, monkeypatch):
    """And the networks are measured in the next dtype as before."""
    path, written = tmp_path / 'result.json', []

    def search(step, gib, tried):
        step(3)
        tried(capacity.Trial(3, 1.5))
        written.append(json.loads(path.read_text())['rows'][0])
        return 3 if gib == 24 else None

    monkeypatch.setattr(bench, 'largest_training_batch', search)
    settings = Settings(
        **dict(mode=['train'], dtype=['fp32', 'bf16'], arch='atto', size=(64, 64)),
        **dict(networks=['eager'], rounds=2, warmup=0, batch=1),
    )
    settings.fit_gib = [24, 80]  # a CPU is refused
    rows = bench.run(settings, path, '')['rows']
    assert written[0]['trials'] == {'24': [dict(batch=3, ms=1.5)]}
    for row in rows:
        assert row['largest_batch'] == {'24': 3}  # the other search took too long
        assert len(row['trials']['80']) == 1
    assert [row['dtype'] for row in rows] == ['fp32', 'bf16']


@pytest.mark.slow
def test_largest_batch_for_a_memory(monkeypatch):
    """A GPU of 141 GiB on which a model takes 2 GiB and 3 GiB an image, and
    the driver 1 GiB: 24 GiB are enough for 7 images."""
    gib = 2**30
    limits = []

    used = []

    def step(batch):
        used.append((2 + 3 * batch) * gib)
        if limits and used[-1] > limits[-1] * 141 * gib:
            raise torch.cuda.OutOfMemoryError

    for name, value in dict(
        mem_get_info=lambda: (138 * gib, 141 * gib),
        memory_reserved=lambda: 2 * gib,
        max_memory_allocated=lambda: used[-1],
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        set_per_process_memory_fraction=limits.append,
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    trials = []
    assert capacity.largest_training_batch(step, 24, trials.append) == 7
    assert limits == [pytest.approx(23 / 141), 1.0]
    assert {t.batch: t.ms is not None for t in trials} == {7: True, 8: False}
    # One that takes too long leaves its trials.
    limits.clear()
    monkeypatch.setattr(capacity, 'SEARCH_S', -1)
    assert capacity.largest_training_batch(step, 24, trials.append) is None
    assert limits[-1] == 1.0


def test_bad_arguments(tmp_path, capsys):
    assert '--threads 1' in refusal(capsys, '--clock', 'cpu', '--threads', '2')
    assert 'not 1' in refusal(capsys, '--rounds', '1')
    assert 'run alone' in refusal(capsys, '--mode', 'train', 'detector')
    assert 'fp32, amp or amp-fp16' in refusal(
        capsys, '--mode', 'detector', '--dtype', 'bf16'
    )
    assert '--networks timm' in refusal(
        capsys, '--mode', 'segmentor', '--networks', 'timm'
    )
    assert '--device cuda' in refusal(capsys, '--mode', 'segmentor', '--fit-gib', '24')
    assert '--device cuda' in refusal(capsys, '--fit-gib', '24')
    assert 'for inference' in refusal(
        capsys, '--mode', 'detector', '--networks', 'lean+deploy'
    )
    assert 'for whole models' in refusal(capsys, '--networks', 'swin')
    if not torch.cuda.is_available():
        assert 'no GPU' in refusal(capsys, '--device', 'cuda')
    other = tmp_path / 'other.json'
    other.write_text('{}')
    with pytest.raises(SystemExit, match='no result'):
        benchmark.main(['--plot', str(other), '--out', str(tmp_path / 'x.png')])


def test_fp16_of_a_whole_model_needs_a_gpu(capsys):
    pytest.importorskip('mmseg')
    assert 'a CPU takes amp (bf16) and fp32' in refusal(
        capsys, '--arch', 'atto', '--mode', 'segmentor', '--dtype', 'amp-fp16'
    )


@pytest.mark.parametrize('parts', [False, True])
def test_plot_of_memory_and_batches(parts, tmp_path):
    """What only a GPU gives."""
    row = dict(
        network='auto',
        mode='detector',
        dtype='amp',
        median_ms=3.0,
        times_ms=[2.0, 3.0, 4.0],
        floor_ms=1.0,
        peak_bytes=3 * 2**20,
        largest_batch={'24': 11},
    )
    path = tmp_path / 'result.json'
    result = dict(arch='tiny', batch=2, size=[64, 96], rows=[row])
    if parts:
        result = dict(parts=dict(one=result, checks=dict(records=[])))
    path.write_text(json.dumps(result))
    panels = plot.read_panels([str(path)])
    title = 'detector, bf16 autocast\ntiny, 2x3x64x96'
    assert {key[1:]: bars[0].value for key, bars in panels.items()} == {
        (title, 'ms'): 3,
        (title, 'MiB at the peak'): 3,
        (title, 'images that fit in 24 GiB'): 11,
    }


def test_tables_are_current():
    assert make_benchmark_tables.main(['--check']) == 0


def test_tables_that_are_not(tmp_path, monkeypatch, capsys):
    (tmp_path / 'benchmarks').symlink_to(ROOT / 'benchmarks')
    (tmp_path / 'docs').mkdir()
    for page in make_benchmark_tables.TABLES:
        text = (ROOT / page).read_text()
        (tmp_path / page).write_text(
            re.sub(r'\| fp32 \| \d+% /', '| fp32 | 1% /', text, count=1)
        )
    monkeypatch.setattr(make_benchmark_tables, 'ROOT', tmp_path)
    assert make_benchmark_tables.main(['--check']) == 1
    assert 'README.md is not current' in capsys.readouterr().out
    assert make_benchmark_tables.main([]) == 0
    assert make_benchmark_tables.main(['--check']) == 0
    readme = (tmp_path / 'README.md').read_text()
    assert readme == (ROOT / 'README.md').read_text()
    table = readme[readme.index('tools/maintenance/make_benchmark_tables.py') :]
    assert ' ms' not in table[: table.index('<!-- end -->')]  # ratios only
    (tmp_path / 'README.md').write_text('no marks')
    with pytest.raises(SystemExit, match="0 places for the table 'ratios'"):
        make_benchmark_tables.main([])
