"""Mixed precision that picks its dtype, and fused AdamW."""

import copy
import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from convnext_mm import AmpOptimWrapper, ConvNeXt
from convnext_mm.compat import mmcv_ops
from convnext_mm.engine.optimizers import amp

CONSTRUCTOR = 'convnext_mm.LayerDecayOptimWrapperConstructor'


class Classifier(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        arch = dict(depths=[1] * 4, channels=[8, 16, 24, 32])
        self.backbone = ConvNeXt(arch, layer_scale_init_value=1.0, **kwargs)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def build(model, fused=True, kind='convnext_mm.AmpOptimWrapper', **kwargs):
    return build_optim_wrapper(
        model,
        dict(
            type=kind,
            constructor=CONSTRUCTOR,
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=fused),
            paramwise_cfg=dict(decay_rate=0.7),
            **kwargs,
        ),
    )


def steps(model, wrapper, count, start=0):
    """Losses of training on random images and labels."""
    losses = []
    for step in range(start, start + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 32, 32, generator=generator)
        y = torch.randint(5, (4,), generator=generator)
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(x), y)
        wrapper.update_params(loss)
        losses.append(loss.item())
    return losses


def deviation(a, b):
    """Largest norm-wise relative difference of two models' parameters."""
    return max(
        ((p - q).norm() / q.norm()).item()
        for p, q in zip(a.parameters(), b.parameters())
        if q.any()
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier()


@pytest.fixture
def bf16_cpu(monkeypatch):
    monkeypatch.setattr(amp, 'has_bf16', lambda device: True)


@pytest.mark.slow
@pytest.mark.parametrize('clip', [None, dict(max_norm=0.5)])
@pytest.mark.parametrize('scaled', [False, True])
def test_fused_adamw_is_equal(model, clip, scaled):
    """With groups of layer decay, gradient clipping and a loss scale, whose
    overflowing steps (the scale starts too high) both skip."""
    runs = {}
    for fused in (False, True):
        net = copy.deepcopy(model)
        wrapper = build(net, fused, dtype='bfloat16', clip_grad=clip)
        wrapper._resolve(net)
        wrapper._enabled = False  # fp32: only the update is compared
        wrapper.loss_scaler = torch.amp.GradScaler(
            'cpu', enabled=scaled, init_scale=2.0**127 if scaled else 1.0
        )
        losses = steps(net, wrapper, 40)
        assert all(group['fused'] is fused for group in wrapper.optimizer.param_groups)
        runs[fused] = net, losses, wrapper.loss_scaler.get_scale()
    assert deviation(runs[True][0], runs[False][0]) < 1e-4
    assert runs[True][1] == pytest.approx(runs[False][1], rel=1e-5)
    assert runs[True][2] == runs[False][2]
    assert runs[True][1][-1] != runs[True][1][0]


@pytest.mark.parametrize('before, after', [(False, True), (True, False)])
def test_resume_into_the_other_adamw(model, before, after):
    """A checkpoint does not decide how the update is computed."""
    reference = copy.deepcopy(model)
    steps(reference, build(reference, after, 'OptimWrapper'), 6)
    first = build(model, before, 'OptimWrapper')
    steps(model, first, 3)
    second = build(model, after, 'OptimWrapper')
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {g['fused'] for g in second.optimizer.param_groups} == {after}
    steps(model, second, 3, start=3)
    assert deviation(model, reference) < 1e-5
    counts = {int(s['step']) for s in second.optimizer.state.values()}
    assert counts == {6}


def test_frozen_stages_train_fused(model):
    torch.manual_seed(0)
    net = Classifier(frozen_stages=2)
    frozen = copy.deepcopy(net.backbone.stages[1])
    assert all(map(math.isfinite, steps(net, build(net), 2)))
    assert all(
        torch.equal(p, q)
        for p, q in zip(frozen.parameters(), net.backbone.stages[1].parameters())
    )


def test_bf16_where_the_device_has_it(model, bf16_cpu):
    wrapper = build(model)
    assert type(wrapper) is AmpOptimWrapper
    seen = []
    model.head.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    assert all(map(math.isfinite, steps(model, wrapper, 2)))
    assert set(seen) == {torch.bfloat16}
    assert not wrapper.loss_scaler.is_enabled()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fp32_on_a_cpu_without(model, monkeypatch):
    monkeypatch.setattr(amp, 'has_bf16', lambda device: False)
    plain = copy.deepcopy(model)
    assert steps(model, build(model), 2) == steps(
        plain, build(plain, kind='OptimWrapper'), 2
    )


class FakeGpu:
    """MMEngine's checks pass, its loss scale and autocast are a CPU's."""

    def __init__(self, monkeypatch, bf16):
        from mmengine.optim.optimizer import amp_optimizer_wrapper as theirs

        monkeypatch.setattr(theirs, 'is_cuda_available', lambda: True)
        monkeypatch.setattr(
            theirs, 'GradScaler', lambda **k: torch.amp.GradScaler('cpu', **k)
        )
        monkeypatch.setattr(amp, 'get_device', lambda: 'cuda')
        monkeypatch.setattr(amp, 'has_bf16', lambda device: bf16)


def test_fp16_with_loss_scale_on_older_gpus(model, monkeypatch):
    FakeGpu(monkeypatch, bf16=False)
    wrapper = build(model, loss_scale=128.0)
    wrapper._resolve(model)
    assert wrapper.cast_dtype is torch.float16
    assert wrapper.loss_scaler.is_enabled()
    assert wrapper.loss_scaler.get_scale() == 128.0


def test_resume_in_the_other_dtype(model, monkeypatch):
    """From a GPU with bfloat16 to one without, and back."""
    states = []
    for bf16 in (True, False):
        FakeGpu(monkeypatch, bf16)
        wrapper = build(model)
        wrapper._resolve(model)
        states.append(wrapper.state_dict())
    assert not states[0]['loss_scaler'] and states[1]['loss_scaler']
    for bf16, state in zip((False, True), states):
        FakeGpu(monkeypatch, bf16)
        wrapper = build(model)
        wrapper.load_state_dict(state)
        wrapper._resolve(model)
        assert wrapper.loss_scaler.is_enabled() is not bf16


def test_what_cannot_run_in_bf16_is_found(model, monkeypatch):
    ops = pytest.importorskip('mmcv.ops')
    from mmdet.models import FocalLoss, RetinaHead, SingleRoIExtractor

    model.deform = ops.MultiScaleDeformableAttention(8, 2)
    model.roi = SingleRoIExtractor(
        roi_layer=dict(type='RoIAlign', output_size=7),
        out_channels=8,
        featmap_strides=[4, 8],
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        model.dense = RetinaHead(
            num_classes=3,
            in_channels=8,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        )
    assert isinstance(model.dense.loss_cls, FocalLoss)
    monkeypatch.setattr(mmcv_ops, 'in_use', lambda: False)
    assert amp.modules_without_bf16(model, 'cuda') == []
    model.loss = FocalLoss()
    model.dcn = ops.ModulatedDeformConv2dPack(8, 8, 3)
    assert amp.modules_without_bf16(model, 'cpu') == ['dcn (ModulatedDeformConv2dPack)']
    assert amp.modules_without_bf16(model, 'cuda') == [
        'loss (FocalLoss)',
        'dcn (ModulatedDeformConv2dPack)',
    ]
    FakeGpu(monkeypatch, bf16=True)
    wrapper = build(model)
    wrapper._resolve(model)
    assert wrapper.cast_dtype is torch.float16
    # Operators on torchvision have no such limit.
    monkeypatch.setattr(mmcv_ops, 'in_use', lambda: True)
    assert amp.modules_without_bf16(model, 'cuda') == []
    wrapper = build(model)
    wrapper._resolve(model)
    assert wrapper.cast_dtype is torch.bfloat16
    monkeypatch.setattr(mmcv_ops, 'in_use', lambda: False)
    wrapper = build(model, dtype='bfloat16')
    wrapper._resolve(model)
    assert wrapper.cast_dtype is torch.bfloat16


def test_boxes_stay_in_fp32_under_bf16(model):
    pytest.importorskip('mmdet')
    from mmdet.models import RetinaHead

    with DefaultScope.overwrite_default_scope('mmdet'):
        head = RetinaHead(num_classes=3, in_channels=8)
    maps = [torch.rand(1, 8, 4, 4)] * 5
    for expected in (torch.bfloat16, torch.float32):
        with torch.autocast('cpu', torch.bfloat16):
            scores, boxes = head(maps)
        assert {x.dtype for x in (*scores, *boxes)} == {expected}
        amp.keep_boxes_in_fp32(head)


def test_wrong_dtypes_are_named(model):
    with pytest.raises(ValueError, match="'auto'.*got 'float8'"):
        build(model, dtype='float8')
    with pytest.raises(ValueError, match='on a CPU'):
        build(model, dtype=torch.float16)
