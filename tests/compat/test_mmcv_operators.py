"""mmcv's operators on torchvision: against the compiled ones, recorded and where
they are installed, against definitions, and on what is unusual."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('torchvision')
pytest.importorskip('mmdet')
import mmcv.ops
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss

import compare_mmcv_operators as compare
from convnext_mm.compat.mmcv_ops import in_use, operators

EXACT = {'nms', 'batched_nms', 'multiclass_nms', 'nms_match', 'roi_align'}
TOLERANCE = 1e-5  # of the largest value


@pytest.fixture(autouse=True)
def on_torchvision():
    with compare.calling(operators):
        yield


def bound(name: str) -> float:
    # Soft-NMS within batched NMS.
    return 1e-6 if name == 'batched_nms' else 0 if name in EXACT else TOLERANCE


@pytest.mark.parametrize('name', compare.CASES)
def test_recorded_results_of_the_compiled_operators(name, data_dir):
    arrays = np.load(data_dir / 'mmcv_operators.npz')
    for seed in range(compare.RECORDED):
        start = f'{name}/{seed}/'
        expected = {
            key.removeprefix(start): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(start)
        }
        found = compare.run(name, seed)
        assert expected.keys() == found.keys()
        # Another machine's products differ in their last bits.
        assert compare.difference(expected, found) <= max(bound(name), 1e-6)


@pytest.mark.parametrize('name', compare.CASES)
def test_random_cases_equal_the_compiled_operators(name):
    if in_use():
        pytest.skip('needs compiled operators of mmcv: make setup MMCV=compiled')
    compiled = sys.modules['mmcv._ext']
    for seed in range(60):
        expected = compare.run(name, seed, compiled)
        assert compare.difference(expected, compare.run(name, seed)) <= bound(name), (
            seed
        )


def test_a_difference_is_seen():
    one = dict(a=torch.ones(3), b=torch.tensor([1, 2]))
    assert compare.difference(one, one) == 0
    assert compare.difference(one, {**one, 'a': torch.ones(3) + 0.5}) == 0.5
    assert compare.difference(one, {**one, 'a': torch.ones(2)}) == float('inf')
    assert compare.difference(one, {**one, 'b': torch.tensor([1, 3])}) == float('inf')
    nan = torch.tensor([1, float('nan'), 1])
    assert compare.difference(one, {**one, 'a': nan}) == float('inf')


# Gradients, in fp64


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=dtype)


ROIS = torch.tensor([[0, 1.3, 1.1, 9.7, 8.2], [1, 2.2, 0.4, 5.9, 10.3]])


@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('aligned', [True, False])
def test_gradcheck_of_roi_align(ratio, aligned):
    maps = random(2, 2, 6, 5).requires_grad_()
    rois = ROIS.double()
    assert torch.autograd.gradcheck(
        lambda x: mmcv.ops.roi_align(x, rois, (2, 3), 0.5, ratio, 'avg', aligned), maps
    )


def test_gradcheck_of_roi_pool():
    maps = random(2, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: mmcv.ops.roi_pool(x, ROIS.double(), 2, 0.5), maps
    )


@pytest.mark.parametrize('groups, deform_groups', [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize('modulated', [True, False])
def test_gradcheck_of_deformable_convolutions(groups, deform_groups, modulated):
    inputs = [
        random(2, 4, 3, 3),
        random(2, 2 * 4 * deform_groups, 2, 2, seed=1),
        random(2, 4 * deform_groups, 2, 2, seed=2).sigmoid(),
        random(2, 4 // groups, 2, 2, seed=3),
        random(2, seed=4),
    ]
    how = ((2, 1), (1, 0), 1, groups, deform_groups)
    if not modulated:
        del inputs[4], inputs[2]
    operator = mmcv.ops.modulated_deform_conv2d if modulated else mmcv.ops.deform_conv2d
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: operator(*x, *how), inputs)
    # The gradient of the weight alone takes another way.
    for tensor in inputs:
        tensor.requires_grad_(tensor is inputs[-1 - modulated])
    assert torch.autograd.gradcheck(lambda *x: operator(*x, *how), inputs)


@pytest.mark.parametrize('weighted', [True, False])
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize('kind', ['sigmoid', 'softmax'])
def test_gradcheck_of_focal_losses(kind, reduction, weighted):
    logits = random(5, 3).requires_grad_()
    target = torch.tensor([0, 2, 1, 1, 0])
    weight = torch.tensor([0.5, 2, 1]).double() if weighted else None
    loss = getattr(mmcv.ops, f'{kind}_focal_loss')
    if (kind, reduction) == ('softmax', 'none'):
        # mmcv multiplies (N, C) by (N,) there.
        with pytest.raises(RuntimeError):
            loss(logits, target, 2.0, 0.25, weight, reduction).sum().backward()
        return
    assert torch.autograd.gradcheck(
        lambda x: loss(x, target, 2.0, 0.25, weight, reduction), logits
    )


def attention_inputs(dtype=torch.float64):
    shapes = torch.tensor([[4, 3], [2, 2]])
    value = random(2, 16, 2, 3, dtype=dtype)
    locations = random(2, 5, 2, 2, 2, 2, seed=1, dtype=dtype).sigmoid()
    weights = random(2, 5, 2, 2, 2, seed=2, dtype=dtype).sigmoid()
    return value, shapes, locations, weights


def test_gradcheck_of_deformable_attention():
    value, shapes, locations, weights = attention_inputs()
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    starts = torch.tensor([0, 12])

    def attend(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, locations, weights, 64
        )

    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    assert torch.equal(attend(*inputs), expected)
    assert torch.autograd.gradcheck(attend, inputs)


# Definitions


@pytest.mark.parametrize('spread', [1, 30])
def test_sigmoid_focal_loss_is_mmdets(spread):
    logits = (spread * random(50, 4, dtype=torch.float32)).requires_grad_()
    target = torch.randint(0, 5, (50,), generator=torch.manual_seed(0))
    one_hot = F.one_hot(target, 5)[:, :4]
    found = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'sum')
    expected = py_sigmoid_focal_loss(logits, one_hot, reduction='sum')
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_softmax_focal_loss_is_its_formula():
    logits = random(6, 3, dtype=torch.float32).requires_grad_()
    target = torch.tensor([0, 2, 1, -1, 0, 2])  # -1: does not count
    found = mmcv.ops.softmax_focal_loss(logits, target, 1.5, 0.25, None, 'sum')
    counted = target >= 0
    p = logits.softmax(1)[counted, target[counted]]
    expected = (-0.25 * (1 - p) ** 1.5 * p.log()).sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize('kind', ['sigmoid', 'softmax'])
def test_weights_of_classes_need_a_class(kind):
    loss = getattr(mmcv.ops, f'{kind}_focal_loss')
    with pytest.raises(ValueError, match='targets from 0 to 3.*must be 0 to 2'):
        loss(torch.zeros(2, 3), torch.tensor([0, 3]), 2.0, 0.25, torch.ones(3))


@pytest.mark.parametrize('scale', [1, 0.5, 0.3])
def test_roi_pool_is_the_largest_of_each_bin(scale):
    """mmcv's kernel, one value after the other (roi_pool_cuda_kernel.cuh)."""
    maps = random(2, 3, 9, 7, dtype=torch.float32)
    rois = torch.tensor(
        [
            [0, 0, 0, 7, 7],
            [1, 1.3, 1.1, 9.7, 8.2],
            [0, -3, -2.5, 4, 30],  # beyond the edges
            [1, 3, 3, 3, 3],
            [0, 20, 20, 30, 30],  # outside
            [0, 5, 5, 1, 1],  # no size
        ]
    )
    maps.requires_grad_()
    found = mmcv.ops.roi_pool(maps, rois, (2, 3), scale)
    weights = random(*found.shape, seed=3, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(found, maps, weights)
    values, expected = maps.detach(), torch.zeros_like(found)
    expected_gradient = torch.zeros_like(maps)
    for k, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (
            c * scale for c in (*corners[:2], *(c + 1 for c in corners[2:]))
        )
        if x2 <= x1 or y2 <= y1:
            continue
        for i in range(2):
            for j in range(3):
                low_y, high_y = y1 + i * (y2 - y1) / 2, y1 + (i + 1) * (y2 - y1) / 2
                low_x, high_x = x1 + j * (x2 - x1) / 3, x1 + (j + 1) * (x2 - x1) / 3
                ys = range(max(0, int(low_y.floor())), min(9, int(high_y.ceil())))
                xs = range(max(0, int(low_x.floor())), min(7, int(high_x.ceil())))
                for c in range(3):
                    pixels = [
                        (values[int(image), c, y, x], y, x) for y in ys for x in xs
                    ]
                    if pixels:
                        value, y, x = max(pixels, key=lambda p: float(p[0]))
                        expected[k, c, i, j] = value
                        expected_gradient[int(image), c, y, x] += weights[k, c, i, j]
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_soft_nms_leaves_boxes_without_area():
    boxes = torch.tensor([[0, 0, 4, 0.0], [0, 0, 5, 0], [9, 9, 12, 12]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for method in ('naive', 'linear', 'gaussian'):
        dets, kept = mmcv.ops.soft_nms(boxes, scores, method=method)
        assert kept.tolist() == [0, 1, 2] and torch.equal(dets[:, 4], scores)


def test_a_threshold_is_compared_in_fp32():
    """0.6 in fp32 is above 0.6: torchvision, given the double, drops the box."""
    boxes = torch.tensor([[0, 0, 1, 1.0], [0, 0, 1, 0.6]])
    dets, kept = mmcv.ops.nms(boxes, torch.tensor([2, 1.0]), 0.6)
    assert kept.tolist() == [0, 1] and len(dets) == 2


# Dtypes, layouts, and nothing at all


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['roi_align', 'roi_pool', 'deform', 'modulated'])
def test_16_bit_is_fp32_rounded_once(name, dtype):
    maps = random(2, 4, 9, 8, dtype=dtype)
    rois = ROIS.to(dtype)
    offset, mask = random(2, 18, 7, 6, seed=1), random(2, 9, 7, 6, seed=2).sigmoid()
    weight = random(4, 4, 3, 3, seed=3)
    operator = {
        'roi_align': lambda x: mmcv.ops.roi_align(x, rois.to(x), 3, 0.5),
        'roi_pool': lambda x: mmcv.ops.roi_pool(x, rois.to(x), 3, 0.5),
        'deform': lambda x: mmcv.ops.deform_conv2d(
            x, offset.to(dtype).to(x), weight.to(dtype).to(x)
        ),
        'modulated': lambda x: mmcv.ops.modulated_deform_conv2d(
            x, *(y.to(dtype).to(x) for y in (offset, mask, weight)), None
        ),
    }[name]
    results = []
    for x in (maps, maps.float()):
        x = x.clone().requires_grad_()
        output = operator(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
        assert output.dtype == gradient.dtype == x.dtype
        results.append((output.to(dtype), gradient.to(dtype)))
    for ours, expected in zip(*results):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_every_dtype(dtype):
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]], dtype=dtype)
    scores = torch.tensor([3, 2, 1], dtype=dtype)
    for dets, kept in (
        mmcv.ops.nms(boxes, scores, 0.5),
        mmcv.ops.soft_nms(boxes, scores, 0.5, method='naive'),
        mmcv.ops.batched_nms(
            boxes, scores, torch.zeros(3, dtype=torch.long), dict(iou_threshold=0.5)
        ),
    ):
        assert kept.tolist() == [0, 2] and dets.dtype == dtype
    dets = torch.cat([boxes, scores[:, None]], dim=1)
    groups = [group.tolist() for group in mmcv.ops.nms_match(dets, 0.5)]
    assert groups == [[0, 1], [2]]


def test_deformable_attention_in_bfloat16():
    value, shapes, locations, weights = attention_inputs(torch.bfloat16)
    starts = torch.tensor([0, 12])
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    found = MultiScaleDeformableAttnFunction.apply(
        value, shapes, starts, locations, weights, 64
    )
    expected = multi_scale_deformable_attn_pytorch(
        value.float(), shapes, locations.float(), weights.float()
    )
    assert torch.equal(found, expected.to(torch.bfloat16))
    for gradient in torch.autograd.grad(found.sum(), inputs):
        assert gradient.dtype is torch.bfloat16 and gradient.isfinite().all()


def test_focal_loss_in_bfloat16():
    logits = random(9, 4, dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(9) % 5
    found = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    expected = mmcv.ops.sigmoid_focal_loss(
        logits.float(), target, 2.0, 0.25, None, 'none'
    )
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize('layout', ['channels_last', 'every second', 'permuted'])
@pytest.mark.parametrize('name', ['roi_align', 'roi_pool', 'deform', 'modulated'])
def test_any_memory_layout(name, layout):
    def laid_out(x):
        if layout == 'channels_last':
            return x.contiguous(memory_format=torch.channels_last)
        if layout == 'permuted':
            return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        return x.repeat_interleave(2, dim=3)[..., ::2]

    maps, weight = (
        random(*s, dtype=torch.float32) for s in [(2, 4, 9, 8), (4, 4, 3, 3)]
    )
    offset, mask = (
        random(2, n, 7, 6, dtype=torch.float32, seed=n).sigmoid() for n in (18, 9)
    )
    operator = {
        'roi_align': lambda x, o, m, w: mmcv.ops.roi_align(x, ROIS, 3, 0.5),
        'roi_pool': lambda x, o, m, w: mmcv.ops.roi_pool(x, ROIS, 3, 0.5),
        'deform': lambda x, o, m, w: mmcv.ops.deform_conv2d(x, o, w),
        'modulated': lambda x, o, m, w: mmcv.ops.modulated_deform_conv2d(
            x, o, m, w, None
        ),
    }[name]
    results = []
    for change in (lambda x: x, laid_out):
        inputs = [change(x).detach() for x in (maps, offset, mask, weight)]
        for x in inputs:
            x.requires_grad_()
        output = operator(*inputs)
        gradient = change(random(*output.shape, dtype=torch.float32, seed=9))
        output.backward(gradient)
        results.append([output, *(x.grad for x in inputs if x.grad is not None)])
    for expected, found in zip(*results):
        assert torch.equal(expected, found)


def test_nothing_in_nothing_out():
    none = torch.zeros(0, 4)
    for function in (mmcv.ops.nms, mmcv.ops.soft_nms):
        dets, kept = function(none, torch.zeros(0), 0.5)
        assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.long
    assert mmcv.ops.nms_match(torch.zeros(0, 5), 0.5) == []
    maps = random(2, 4, 9, 8, dtype=torch.float32).requires_grad_()
    for pool in (mmcv.ops.roi_align, mmcv.ops.roi_pool):
        pooled = pool(maps, torch.zeros(0, 5), 3, 1.0)
        (gradient,) = torch.autograd.grad(pooled.sum(), maps)
        assert pooled.shape == (0, 4, 3, 3) and not gradient.any()
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(
        logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, 'sum'
    )
    assert loss == 0


def test_boxes_beyond_the_map_and_without_size():
    maps = random(1, 2, 6, 6, dtype=torch.float32).requires_grad_()
    rois = torch.tensor([[0, 100, 100, 120, 120.0], [0, 3, 3, 3, 3]])
    pooled = mmcv.ops.roi_align(maps, rois, 2, 1.0, 0, 'avg', True)
    assert not pooled[0].any() and pooled.isfinite().all()
    (gradient,) = torch.autograd.grad(pooled.sum(), maps)
    assert gradient.isfinite().all()


def test_a_second_backward_pass_gives_the_same():
    weight = random(4, 4, 3, 3, dtype=torch.float32).requires_grad_()
    maps = random(2, 4, 9, 8, dtype=torch.float32).requires_grad_()
    offset = random(2, 18, 7, 6, dtype=torch.float32)
    loss = mmcv.ops.deform_conv2d(maps, offset, weight).square().sum()
    first = torch.autograd.grad(loss, (maps, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (maps, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# What is missing


@pytest.mark.parametrize(
    'call',
    [
        lambda: mmcv.ops.roi_align(torch.zeros(1, 1, 4, 4), ROIS[:1], 2, 1.0, 0, 'max'),
        lambda: operators.carafe_forward(1, kernel=2),
        lambda: operators.nms_rotated(),
    ],
    ids=['max', 'carafe', 'rotated'],
)
def test_what_is_not_offered_says_how_to_get_it(call):
    with pytest.raises(NotImplementedError, match='make setup MMCV=compiled'):
        call()


def test_an_operator_is_named_when_called_and_not_on_import():
    assert callable(operators.anything_mmcv_asks_for)
    with pytest.raises(NotImplementedError, match="'anything_mmcv_asks_for'"):
        operators.anything_mmcv_asks_for()
    with pytest.raises(AttributeError):
        operators.__path__  # noqa: B018


def test_the_log_says_it_once(monkeypatch):
    said = []
    monkeypatch.setattr(operators, 'print_log', lambda text, logger: said.append(text))
    operators.say_once.cache_clear()
    for _ in range(2):
        mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    assert len(said) == 1 and 'torchvision' in said[0] and 'nothing was comp' in said[0]


def test_versions_are_strings():
    assert 'torchvision' in operators.get_compiler_version()
    assert operators.get_compiling_cuda_version() == 'none'


def test_deterministic_gpus_take_torchvisions_other_way(monkeypatch):
    maps = random(2, 2, 6, 5, dtype=torch.float32).requires_grad_()

    def gradient():
        pooled = mmcv.ops.roi_align(maps, ROIS, 2, 0.5)
        return torch.autograd.grad(pooled.sum(), maps)[0]

    expected, asked = gradient(), []
    monkeypatch.setattr(operators, 'needs_an_order', lambda x: asked.append(x) or True)
    torch.testing.assert_close(gradient(), expected)
    assert asked


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layer', ['DeformConv2dPack', 'ModulatedDeformConv2dPack'])
def test_deformable_layers_train_in_mixed_precision(layer, dtype):
    convolution = getattr(mmcv.ops, layer)(8, 8, 3)
    x = random(2, 8, 9, 8, dtype=torch.float32).requires_grad_()
    with torch.autocast('cpu', dtype, enabled=dtype is not torch.float32):
        output = convolution(x)
    output.square().mean().backward()
    assert output.dtype is dtype
    for tensor in (x, *convolution.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()
