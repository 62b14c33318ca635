"""The Triton kernels against plain PyTorch in Triton's interpreter, which is
slow, so shapes are small; and compiled, on a GPU where there is one."""

import functools
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import block_cases
from block_cases import (
    NAMES,
    SMALL,
    assert_equals_eager,
    call,
    relative,
    run,
    run_backbone,
)
from convnext_mm import ConvNeXt
from convnext_mm.archs import ARCHS
from convnext_mm.models import block as block_module
from convnext_mm.models.block import Block
from convnext_mm.ops import eager, fused, lean, measure
from convnext_mm.ops import triton as triton_ops
from repo import ROOT

pytest.importorskip('triton', minversion=triton_ops.MIN_TRITON)
from convnext_mm.ops.triton import choose, launch
from convnext_mm.ops.triton import kernels as kernels_module
from convnext_mm.ops.triton import operators as kernels

# The interpreter takes its time: 3 x 3 unless 7 x 7 is what is tested.
arguments = functools.partial(block_cases.arguments, kernel=3)


@pytest.fixture(params=['library', 'fused'])
def products(request):
    """Matrix products by PyTorch, or with what follows them in one kernel."""
    with choose.taking({'library': 0, 'fused': -1}[request.param]):
        yield request.param


@pytest.fixture
def quick_check(monkeypatch):
    """The self-check of small maps, run anew; the interpreter takes its time."""
    monkeypatch.setattr(triton_ops, 'CHECKED_WIDTHS', (24,))
    monkeypatch.setattr(triton_ops, 'CHECKED_SIZE', (7, 5))
    monkeypatch.setattr(triton_ops, 'MOST_CANDIDATES', 2)
    triton_ops._works_on.cache_clear()
    yield
    triton_ops._works_on.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    'kernel, version, scale, dilation, samples, size',
    [
        (7, 1, 1.0, 1, 3, (9, 11)),
        (3, 1, 1e-6, 1, 2, (9, 11)),
        (3, 1, None, 1, 2, (4, 5)),
        (7, 2, None, 1, 2, (5, 6)),
        (3, 1, 1.0, 2, 2, (5, 17)),
        (7, 1, 1.0, 4, 1, (13, 6)),
        (3, 2, None, 2, 3, (9, 11)),
    ],
)
def test_block_equals_eager(kernel, version, scale, dilation, samples, size):
    values, drop_scale = arguments(
        kernel=kernel, size=size, samples=samples, version=version, scale=scale
    )
    drop_scale = drop_scale if samples > 1 else None
    assert_equals_eager('triton', values, drop_scale, dilation=dilation)


@pytest.mark.parametrize('channels', [5, 24, 40, 96, 176])
def test_block_of_channel_counts(channels):
    values, _ = arguments(channels, size=(2, 3), samples=1)
    assert_equals_eager('triton', values, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    'channels', sorted({c for arch in ARCHS.values() for c in arch.channels})
)
def test_kernels_of_every_channel_count(channels):
    """Those that hold all channels, or a block of them."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 2, 2, 3, channels)
    values = [
        x.permute(0, 3, 1, 2),
        torch.randn(channels, 1, 3, 3),
        *torch.randn(3, channels),
    ]
    values = [v.requires_grad_() for v in values]
    weight, bias, norm_weight, norm_bias = (v.detach() for v in values[1:])
    out = launch.depthwise(x, weight, bias, 1, torch.float32)
    normed = launch.layer_norm(
        out.flatten(1, 2), norm_weight, norm_bias, 1e-6, torch.empty(2, 6, channels)
    ).view(out.shape)
    expected = torch.nn.functional.conv2d(
        *values[:3], padding=1, groups=channels
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, expected)
    expected_normed = torch.nn.functional.layer_norm(
        expected, (channels,), *values[3:], 1e-6
    )
    torch.testing.assert_close(normed, expected_normed)
    got = launch.layer_norm_backward(
        grad.flatten(1, 2), out.detach().flatten(1, 2), values[3], values[4], 1e-6
    )
    expected_grads = torch.autograd.grad(
        expected_normed, [expected, *values[3:]], grad, retain_graph=True
    )
    for a, b in zip(got, expected_grads):
        torch.testing.assert_close(a, b.view(a.shape), rtol=1e-4, atol=1e-4)
    got = launch.depthwise_weight_grad(x, grad, values[1], 1)
    for a, b in zip(got, torch.autograd.grad(expected, values[1:3], grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('choice', range(len(launch.STRIPS)))
@pytest.mark.parametrize('programs, dilation', [(1, 1), (40, 1), (7, 3)])
def test_strips_of_every_height(choice, programs, dilation, monkeypatch):
    """High ones, low ones, several for a program, with the input cast."""
    monkeypatch.setattr(launch, 'programs_at_once', lambda: programs)
    monkeypatch.setattr(launch, 'STRIPS', (launch.STRIPS[choice],))
    torch.manual_seed(0)
    x, grad = torch.randn(2, 3, 40, 17, 9).bfloat16().unbind()
    weight, bias = torch.randn(40, 1, 3, 3), torch.randn(40)
    wide, wide_weight = (t.double().requires_grad_() for t in (x, weight))
    expected = torch.nn.functional.conv2d(
        wide, wide_weight, bias.double(), 1, dilation, dilation, groups=40
    )
    rows, grad_rows = (t.permute(0, 2, 3, 1).contiguous() for t in (x, grad))
    out, cast = launch.depthwise_and_cast(
        rows.float(), weight, bias, dilation, torch.bfloat16
    )
    assert torch.equal(cast, rows)
    assert relative(out.permute(0, 3, 1, 2), expected) < 0.004  # one rounding
    grads = torch.autograd.grad(expected, (wide, wide_weight), grad.double())
    got = launch.depthwise_input_grad(grad_rows, weight, dilation, rows, torch.float32)
    assert relative(got.permute(0, 3, 1, 2), grads[0] + x) < 1e-6
    got, got_bias = launch.depthwise_weight_grad(rows, grad_rows, weight, dilation)
    assert relative(got, grads[1]) < 1e-5
    assert relative(got_bias, grad.double().sum((0, 2, 3))) < 1e-5


def test_each_thread_has_a_value():
    """LayerNorm's backward writes over what it reads: two threads must not share a
    value, which those beyond a tile do."""
    for channels in (*range(1, 130), 768, 3072):
        for values in (16, 32):
            rows, columns, warps = launch._norm_tile(channels, values)
            assert rows * columns >= 32 * warps


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gelu_of_every_16_bit_value(dtype):
    """Less than a unit in the last place of fp16 from exact GELU, and its derivative
    from the exact one; as far as fp32 tells."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = x[x.isfinite()].view(1, 1, -1)
    exact = x.double().requires_grad_()
    h = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(h.sum(), exact)
    size = x.shape[2]
    got, got_slope, sums = torch.zeros(3, 1, 1, size)
    kernels_module.gelu_backward_kernel[1, -(-size // 1024), 1](
        torch.ones(1, 1, size),
        x,
        None,
        None,
        None,
        got_slope,
        got,
        sums,
        1,
        size,
        1,
        1024,
    )
    assert ((got - h).abs() <= 2.7e-4 * h.abs() + 2.2e-8).all()
    unit = 2.0 ** (h.abs().clamp(min=2**-14).log2().floor() - 10)
    assert 0.5 < ((got - h).abs() / unit).max() < 1
    assert (got_slope - slope).abs().max() < 2**-12
    ends = torch.tensor([[[float('inf'), float('-inf'), float('nan')]]], dtype=dtype)
    ones = torch.ones_like(ends)
    slopes, values, _ = launch.gelu_backward(ones, ends, keep_activation=True)
    assert torch.equal(slopes.isnan(), ends.isnan()) and slopes[0, 0, 0] == 1
    assert values[0, 0, 0] == float('inf') and values[0, 0, 2].isnan()


@pytest.mark.slow
@pytest.mark.parametrize(
    'kernel, channels_last', [(1, True), (3, False), (11, True), (13, True)]
)
def test_block_of_other_kernels_and_layouts(kernel, channels_last):
    values, drop_scale = arguments(kernel=kernel, size=(6, 5))
    if not channels_last:
        values['x'] = values['x'].detach().contiguous().requires_grad_()
    assert_equals_eager('triton', values, drop_scale)
    out = call(kernels.block, values)
    assert out.is_contiguous() != channels_last


@pytest.mark.slow
@pytest.mark.parametrize('version, scale', [(1, 1.0), (1, 1e-6), (2, None)])
@pytest.mark.parametrize(
    'dtype, pure',
    [(torch.bfloat16, False), (torch.float16, False), (torch.float16, True)],
)
def test_16_bit_is_as_accurate_as_eager(version, scale, dtype, pure, products):
    """Against fp64 no worse than 1.5 times eager's error."""
    values, drop_scale = arguments(
        32,
        (9, 10),
        samples=2,
        version=version,
        scale=scale,
        dtype=dtype if pure else torch.float32,
    )
    exact = run(
        'eager',
        {k: v.detach().double().requires_grad_() for k, v in values.items()},
        drop_scale,
    )
    plain, got = (
        run(name, values, drop_scale, autocast=None if pure else dtype)
        for name in ('eager', 'triton')
    )

    def error(value, key):
        return (value.double() - exact[key]).norm()

    for key, value in got.items():
        assert value.dtype == plain[key].dtype, key
        assert error(value, key) <= 1.5 * error(plain[key], key), key


@pytest.mark.slow
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('version', [1, 2])
def test_non_finite_inputs_stay_where_they_were(bad, version):
    values, drop_scale = arguments(size=(9, 8), version=version)
    with torch.no_grad():
        values['x'][1, 3, 2, 4] = bad
    got, expected = (run(name, values, drop_scale) for name in ('triton', 'eager'))
    for key in ('out', 'x', 'dwconv_weight', 'norm_weight'):
        assert torch.equal(got[key].isfinite(), expected[key].isfinite()), key
    assert got['out'][0].isfinite().all() and got['out'][2].isfinite().all()


@pytest.mark.slow
def test_fp16_statistics_and_tiny_layer_scale():
    values, drop_scale = arguments(version=2)
    values['x'] = (1e3 * values['x']).detach().requires_grad_()
    values['pwconv1_weight'] = (30 * values['pwconv1_weight']).detach().requires_grad_()
    got = run('triton', values, drop_scale, autocast=torch.float16)
    assert all(v.isfinite().all() for v in got.values())
    # GRN's sum of squares is beyond 65504 here, LayerNorm's is too.
    expected = run('eager', values, drop_scale)
    assert relative(got['out'], expected['out']) < 1e-2
    values, drop_scale = arguments(scale=1e-6)
    expected = run('eager', values, drop_scale)
    got = run('triton', values, drop_scale, autocast=torch.float16)
    for key in ('gamma', 'pwconv2_weight'):
        assert relative(got[key], expected[key]) < 1e-2, key


def test_grn_of_a_map_of_zeros():
    values, _ = arguments(version=2, size=(3, 4))
    with torch.no_grad():
        for name in ('pwconv1_weight', 'pwconv1_bias'):
            values[name].zero_()
    assert_equals_eager('triton', values, None)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('alone', [True, False])
def test_only_what_is_asked_for_gets_a_gradient(name, alone):
    version = 2 if name.startswith('grn') else 1
    values, drop_scale = arguments(version=version, size=(4, 5))
    for key, value in values.items():
        value.requires_grad_((key == name) == alone)
    expected = run('eager', values, drop_scale)
    for key, got in run('triton', values, drop_scale).items():
        if expected[key] is None:
            assert got is None, key
        else:
            assert relative(got, expected[key]) < 1e-4, key


def test_unused_output_and_empty_batch():
    block = Block(8, impl='triton')
    x = torch.rand(2, 8, 6, 5, requires_grad=True)
    assert torch.autograd.grad(x.sum() + 0 * block(x).detach().sum(), x)[0].eq(1).all()
    for use_grn in (False, True):
        block = Block(8, impl='triton', use_grn=use_grn)
        out = block(torch.rand(0, 8, 6, 5))
        assert out.shape == (0, 8, 6, 5)
        out.sum().backward()
        assert all(p.grad.eq(0).all() for p in block.parameters())


@pytest.mark.slow
def test_double_backward_is_refused():
    model = ConvNeXt(SMALL, impl='triton', kernel_size=3)
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x)[-1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='eager'"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize('settings', [{}, dict(use_grn=True), dict(out_indices=(1, 3))])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_backbone_equals_eager(settings, autocast):
    """fp32 within the contract; under autocast no worse than eager against
    fp32, as far as the interpreter can tell."""
    settings.update(shape=(2, 3, 33, 36), kernel_size=3)
    exact = run_backbone('eager', **settings)
    plain, got = (
        run_backbone(name, autocast, **settings) for name in ('eager', 'triton')
    )
    for ours, theirs in zip(got[0], plain[0]):
        assert ours.is_contiguous() and theirs.is_contiguous()
        assert ours.dtype == theirs.dtype
    if autocast is None:
        for ours, theirs in zip(got[0], exact[0]):
            assert relative(ours, theirs) < 1e-5
        for name, grad in exact[1].items():
            assert relative(got[1][name], grad) < 1e-4, name
        return
    for part in (0, 1):
        values = [
            r[part] if part == 0 else r[part].values() for r in (got, plain, exact)
        ]
        ours, theirs = (
            sum((a - b).square().sum() for a, b in zip(v, values[2]))
            for v in values[:2]
        )
        assert ours**0.5 <= 1.5 * theirs**0.5


@pytest.mark.slow
@pytest.mark.parametrize('version', [1, 2])
def test_keeps_what_lean_keeps(version):
    """Bytes saved for backward of a block, through hooks that replace them by
    copies; and checkpointing from outside."""
    torch.manual_seed(0)
    saved = {}
    x = (
        torch.rand(2, 8, 6, 5)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    for impl in ('lean', 'triton'):
        block = Block(8, kernel_size=3, impl=impl, use_grn=version == 2)
        tensors = []

        def pack(tensor, tensors=tensors):
            tensors.append(tensor.nbytes)
            return tensor.detach().clone()

        expected = torch.autograd.grad(
            block(x).square().sum(), [x, *block.parameters()]
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = block(x)
        saved[impl] = sum(tensors)
        for again in (out, checkpoint(block, x, use_reentrant=False)):
            got = torch.autograd.grad(again.square().sum(), [x, *block.parameters()])
            assert all(map(torch.equal, got, expected))
    assert saved['triton'] == saved['lean']


@pytest.mark.slow
@pytest.mark.parametrize('autocast', [False, True])
def test_compiles_with_fixed_shapes(autocast):
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, impl='triton', kernel_size=3, drop_path_rate=0.3)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=False)
    x = torch.rand(2, 3, 32, 32)
    outs = []
    for m in (model, compiled):
        torch.manual_seed(1)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outs.append(m(x))
    for a, b in zip(*outs):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('impl', ['lean', 'triton'])
@pytest.mark.parametrize('channels_last', [True, False])
def test_strides_are_those_that_compiled_code_expects(impl, channels_last):
    """Inductor's code asserts them, of all that forward keeps and backward gives."""
    torch.manual_seed(0)
    block = Block(8, impl=impl, kernel_size=3)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.rand(2, 8, 6, 5).contiguous(memory_format=layout).requires_grad_()
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    results = []
    for function in (block, compiled):
        with torch.autocast('cpu', torch.bfloat16):
            out = function(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
        results.append((out, *grads))
    for ours, expected in zip(*results):
        assert torch.equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_operators_are_registered_right(version, dtype):
    values, drop_scale = arguments(8, (3, 4), version=version)
    torch.library.opcheck(
        torch.ops.convnext_mm.triton_forward.default,
        (
            *(values.get(name) for name in NAMES),
            drop_scale,
            1e-6,
            1,
            dtype,
            fused.KEEP_ALL,
        ),
    )
    x = torch.rand(2, 8, 5, 6, requires_grad=True)
    torch.library.opcheck(
        torch.ops.convnext_mm.triton_downsample.default,
        (
            x,
            torch.rand(8),
            torch.rand(8),
            torch.rand(16, 8, 2, 2),
            torch.rand(16),
            1e-6,
            [2, 2],
            [0, 0],
            [1, 1],
            dtype,
        ),
    )
    for channels_last in (True, False):
        torch.library.opcheck(
            torch.ops.convnext_mm.triton_norm.default,
            (x, torch.rand(8), torch.rand(8), 1e-6, channels_last, dtype),
        )


@pytest.mark.parametrize('layer', ['downsample', 'norm'])
@pytest.mark.parametrize('channels_last', [True, False])
def test_layers_equal_eager(layer, channels_last):
    """Of either layout, and for gradients of either layout."""
    torch.manual_seed(0)
    shapes = [(2, 24, 7, 10), (24,), (24,)]
    settings = dict(eps=1e-6)
    if layer == 'downsample':
        shapes += [(16, 24, 2, 2), (16,)]
    else:
        settings['channels_last'] = channels_last
    values = [torch.randn(s).requires_grad_() for s in shapes]
    expected, out = (
        getattr(module, layer)(*values, **settings) for module in (eager, kernels)
    )
    torch.testing.assert_close(out, expected)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        cotangent = torch.randn(out.shape).to(memory_format=memory_format)
        for a, b in zip(
            *(
                torch.autograd.grad(y, values, cotangent, retain_graph=True)
                for y in (out, expected)
            )
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(RuntimeError, match="float64.*impl='auto'"):
        Block(8, impl='triton')(torch.rand(1, 8, 4, 4, dtype=torch.float64))
    monkeypatch.setattr(triton_ops, 'LARGEST_MAP', 128)
    with pytest.raises(RuntimeError, match='128 values.*less than 128'):
        Block(8, impl='triton')(torch.rand(1, 8, 4, 4))
    monkeypatch.undo()
    monkeypatch.setattr(triton_ops, 'MOST_COLUMNS', 30)
    with pytest.raises(RuntimeError, match='32 columns.*less than 30'):
        Block(8, impl='triton')(torch.rand(4, 8, 4, 4))
    monkeypatch.undo()
    monkeypatch.setattr(triton_ops, '_interpreted', lambda: False)
    with pytest.raises(RuntimeError, match='NVIDIA GPU.*cpu'):
        Block(8, impl='triton')(torch.rand(1, 8, 4, 4))


def test_auto_takes_kernels_that_work(monkeypatch, caplog):
    """A device where the kernels fail gets plain PyTorch, and a log line."""

    class OnGPU:
        """What selection asks of a tensor on a GPU."""

        device = torch.device('cuda:0')
        shape = torch.Size((1, 8, 4, 4))
        dtype = torch.float32

    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: (9, 0))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(block_module, 'lean_is_as_fast', lambda device: False)
    monkeypatch.setattr(triton_ops, 'works_on', lambda device: True)
    assert block_module.select_impl('auto', OnGPU()).block is triton_ops.block
    monkeypatch.setattr(triton_ops, 'works_on', lambda device: False)
    assert block_module.select_impl('auto', OnGPU()).block is eager.block
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: (7, 5))
    monkeypatch.setattr(triton_ops, 'works_on', lambda device: True)
    assert block_module.select_impl('auto', OnGPU()).block is eager.block
    monkeypatch.setattr(block_module, 'lean_is_as_fast', lambda device: True)
    assert block_module.select_impl('auto', OnGPU()).block is lean.block
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert block_module.select_impl('auto', OnGPU()).block is eager.block


def test_lean_is_measured_where_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(measure, 'SIZE', (1, 8, 8))
    times = measure._times('cpu')
    assert set(times) == {'eager', 'lean'} and all(t > 0 for t in times.values())
    for seconds, expected in ((1.0, True), (1.1, False)):
        measure._lean_is_as_fast.cache_clear()
        found = dict(eager=1.0, lean=seconds)
        monkeypatch.setattr(measure, '_times', lambda device, found=found: found)
        assert measure.lean_is_as_fast('cpu') == expected
    measure._lean_is_as_fast.cache_clear()


@pytest.mark.slow
def test_self_check_finds_wrong_kernels(monkeypatch, quick_check):
    assert triton_ops.works_on('cpu')
    triton_ops._works_on.cache_clear()
    right = launch.depthwise
    monkeypatch.setattr(launch, 'depthwise', lambda *a: 1.5 * right(*a))
    assert not triton_ops.works_on('cpu')
    triton_ops._works_on.cache_clear()
    monkeypatch.setattr(launch, 'depthwise', None)  # raises when called
    assert not triton_ops.works_on('cpu')


def test_self_check_tries_every_candidate():
    candidates = [launch.STRIPS, (None, *launch.SUM_TILES)]
    candidates += [(None, *tiles) for tiles in launch.PRODUCT_TILES.values()]
    assert max(map(len, candidates)) == triton_ops.MOST_CANDIDATES


@pytest.mark.slow
def test_map_sizes_are_not_compiled_in():
    """Multi-scale training has another size at every step."""
    module = kernels_module
    names = [n for n in dir(module) if n.endswith('_kernel')]
    assert len(names) == 11
    for name in names:
        kernel = getattr(module, name)
        sizes = set(kernel.arg_names) & set(module.SIZES)
        assert sizes
        assert set(kernel.kwargs['do_not_specialize']) == sizes
    keys = []

    def remember(key, rows, candidates, run):
        keys.append(key)
        return candidates[0]

    original, launch.fastest = launch.fastest, remember
    try:
        seen = []
        for size in ((4, 5), (7, 3)):
            keys.clear()
            values, drop_scale = arguments(8, size)
            run('triton', values, drop_scale)
            seen.append(list(keys))
    finally:
        launch.fastest = original
    assert seen[0] == seen[1] and seen[0]


@pytest.fixture
def gpu(monkeypatch):
    """What choosing asks of a GPU. ``gpu.times`` are those of candidates, or the
    errors that they raise."""
    state = SimpleNamespace(times={}, measured=[], capturing=False, broken=False)

    def time(run, candidate):
        state.measured.append(candidate)
        if isinstance(state.times[candidate], Exception):
            raise state.times[candidate]
        return state.times[candidate]

    def synchronize():
        if state.broken:
            raise RuntimeError('CUDA error: an illegal memory access')

    monkeypatch.setattr(choose, 'INTERPRETED', False)
    monkeypatch.setattr(choose, '_fastest', {})
    monkeypatch.setattr(choose, '_unfinished', Counter())
    monkeypatch.setattr(choose, '_time', time)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    monkeypatch.setattr(
        torch.cuda, 'is_current_stream_capturing', lambda: state.capturing
    )
    return state


def test_choice_is_measured_once(gpu):
    """For a device, a key and an order of magnitude; nothing is in PyTorch's
    deterministic mode."""
    gpu.times = dict(a=2.0, b=1.0)
    gpu.capturing = True
    assert choose.fastest(('k', 1), 500, 'ab', None) == 'a'
    gpu.capturing = False
    assert choose.fastest(('k', 1), 500, 'ab', None) == 'b'
    gpu.capturing = True
    assert choose.fastest(('k', 1), 400, 'ab', None) == 'b'
    gpu.capturing = False
    assert gpu.measured == ['a', 'b']
    assert choose.fastest(('k', 2), 500, 'ab', None) == 'b'
    torch.use_deterministic_algorithms(True)
    try:
        assert choose.fastest(('k', 1), 500, 'ab', None) == 'a'
    finally:
        torch.use_deterministic_algorithms(False)
    with choose.taking(2):
        assert choose.fastest(('k', 1), 500, 'ab', None) == 'a'


def test_what_fails_is_left_out(gpu):
    failure = RuntimeError('ptxas: too many registers')
    gpu.times = dict(a=2.0, b=failure, c=1.5)
    for _ in range(2):
        assert choose.fastest(('k', 1), 500, 'abc', None) == 'c'
    assert gpu.measured == ['a', 'b', 'c']
    gpu.times = dict(a=failure, b=failure)
    with pytest.raises(RuntimeError, match="no way to compute k.*impl='lean'"):
        choose.fastest(('k', 2), 500, 'ab', None)
    gpu.times, gpu.broken = dict(a=1.0, b=failure), True
    with pytest.raises(RuntimeError, match='illegal memory access'):
        choose.fastest(('k', 3), 500, 'ab', None)


def test_no_memory_leaves_the_choice_open(gpu):
    """A few times: measuring at every step would take longer than it gains."""
    gpu.times = dict(a=2.0, b=torch.cuda.OutOfMemoryError())
    assert choose.fastest(('k', 1), 500, 'ab', None) == 'a'
    assert not choose._fastest
    gpu.times = dict(a=2.0, b=1.0)
    assert choose.fastest(('k', 1), 500, 'ab', None) == 'b'
    gpu.times, gpu.measured = dict(a=2.0, b=torch.cuda.OutOfMemoryError()), []
    for _ in range(10):
        assert choose.fastest(('k', 2), 500, 'ab', None) == 'a'
    assert len(gpu.measured) == 2 * choose.PATIENCE
    gpu.times = dict(a=torch.cuda.OutOfMemoryError())
    gpu.times['b'] = gpu.times['a']
    assert choose.fastest(('k', 3), 500, 'ab', None) == 'a'
    assert ('k', 3) not in {key[2:] for key in choose._fastest}
    for _ in range(10):
        assert choose.fastest(('k', 3), 500, 'ab', None) == 'a'
    assert len(gpu.measured) == 4 * choose.PATIENCE


def test_starts_what_was_compiled(monkeypatch):
    """A kernel is looked up by all that Triton compiles in; sizes are not."""
    monkeypatch.setattr(choose, '_compiled', {})
    looked_up, started = [], []

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, **options):
                looked_up.append((args, options))
                return {grid: lambda *args: started.append(args)}

            return run

    kernel, grid = Kernel(), (1, 1, 1)
    x = torch.zeros(8)
    for sizes in ((3,), (4,), (4,)):
        choose.start(kernel, grid, (x, None), sizes, (5, 'a'), num_warps=4)
    assert len(looked_up) == 1 and looked_up[0][1] == dict(num_warps=4)
    assert [args[2] for args in started] == [4, 4]
    others = [
        ((x[1:], None), (5, 'a'), 4),  # another alignment
        ((x.half(), None), (5, 'a'), 4),
        ((x, x), (5, 'a'), 4),
        ((x, None), (6, 'a'), 4),
        ((x, None), (5, 'a'), 8),
    ]
    for tensors, settings, warps in others:
        choose.start(kernel, grid, tensors, (3,), settings, num_warps=warps)
    assert len(looked_up) == 1 + len(others)


@pytest.mark.slow
def test_self_check_inside_a_checkpoint(quick_check):
    """The hooks of a checkpoint must not see the check's tensors."""
    x = torch.rand(1, 8, 4, 5, requires_grad=True)

    def run(x):
        assert triton_ops.works_on('cpu')
        return x.sin().cos()

    checkpoint(run, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, -x.sin().sin() * x.cos())


def check_kernels(tmp_path, *options):
    run = subprocess.run(
        [sys.executable, 'tools/maintenance/check_kernels.py', str(tmp_path), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    (path,) = tmp_path.glob('kernels*.json')
    return json.loads(path.read_text())['records']


def test_compiles_for_gpus_without_spills(tmp_path):
    """For compute capability 8.0 and 9.0: no register goes to memory."""
    records = check_kernels(
        tmp_path, '--compile', '--first', '--channels', '96', '--dtypes', 'bfloat16'
    )
    assert {r['sm'] for r in records} == {80, 90}
    assert len({r['kernel'] for r in records}) == 11
    assert all(r['spilled'] == 0 and r['registers'] > 0 for r in records)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_on_a_gpu(tmp_path):
    """Every kernel as the GPU runs it, real shapes, every candidate."""
    records = check_kernels(tmp_path)
    assert {r['dtype'] for r in records} == {'float32', 'bfloat16', 'float16'}
    assert all(r['ok'] for r in records)
