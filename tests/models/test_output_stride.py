"""Dilated features: equal to timm's in outputs and gradients."""

import pytest
import torch

from convnext_mm import ConvNeXt

SMALL = dict(depths=(1, 1, 2, 2), channels=(8, 16, 24, 32))


def to_timm_name(name):
    """Parameter name in timm's feature extractor for one of ours."""
    if name.startswith('downsample_layers.0'):
        return name.replace('downsample_layers.0.', 'stem_')
    kind, stage, rest = name.split('.', 2)
    kind = {'stages': 'blocks', 'downsample_layers': 'downsample'}[kind]
    for ours, theirs in (
        ('dwconv', 'conv_dw'),
        ('pwconv', 'mlp.fc'),
        ('grn.gamma', 'mlp.grn.weight'),
        ('grn.beta', 'mlp.grn.bias'),
    ):
        rest = rest.replace(ours, theirs)
    return f'stages_{stage}.{kind}.{rest}'


def largest_error(value, reference):
    """Over the largest value of the reference."""
    reference = reference.view_as(value)
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize('size', [(64, 64), (101, 75), (70, 129)])
@pytest.mark.parametrize('name', ['convnext_atto', 'convnextv2_atto'])
@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_equals_timm(output_stride, name, size):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    reference = timm.create_model(
        name,
        features_only=True,
        output_stride=output_stride,
        depths=SMALL['depths'],
        dims=SMALL['channels'],
    )
    model = ConvNeXt(
        SMALL, use_grn='v2' in name, out_norm=False, output_stride=output_stride
    )
    theirs = dict(reference.named_parameters())
    pairs = [(p, theirs.pop(to_timm_name(n))) for n, p in model.named_parameters()]
    assert not theirs
    for ours, other in pairs:
        torch.nn.init.normal_(other, std=0.3 if other.ndim == 1 else 0.1)
        ours.data.copy_(other.data.view_as(ours))

    x = torch.randn(2, 3, *size)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    maps, expected = model(inputs[0]), reference(inputs[1])
    assert [y.shape for y in maps] == [y.shape for y in expected]
    for y, z in zip(maps, expected):
        assert largest_error(y, z) < 1e-5
    directions = [torch.randn_like(z) for z in expected]
    for outs in (maps, expected):
        sum((y * d).mean() for y, d in zip(outs, directions)).backward()
    assert largest_error(inputs[0].grad, inputs[1].grad) < 1e-4
    for ours, other in pairs:
        assert largest_error(ours.grad, other.grad) < 1e-4


@pytest.mark.parametrize(
    'output_stride, strides',
    [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))],
)
def test_maps_and_weights(output_stride, strides):
    torch.manual_seed(0)
    plain = ConvNeXt('atto', out_indices=(1, 3))
    model = ConvNeXt(
        'atto', out_indices=(1, 3), output_stride=output_stride, with_cp=True
    )
    model.load_state_dict(plain.state_dict())
    shapes = [tuple(y.shape[2:]) for y in model(torch.rand(1, 3, 96, 160))]
    assert shapes == [(96 // strides[i], 160 // strides[i]) for i in (1, 3)]


def test_other_stems():
    x = torch.rand(1, 3, 64, 64)
    plain = ConvNeXt('atto', stem_patch_size=8)(x)  # 32 dilates nothing
    assert [y.shape[-1] for y in plain] == [8, 4, 2, 1]
    maps = ConvNeXt('atto', stem_patch_size=8, output_stride=16)(x)
    assert [y.shape[-1] for y in maps] == [8, 4, 4, 4]


@pytest.mark.parametrize(
    'settings, error, message',
    [
        (dict(output_stride=4), ValueError, r'one of \(8, 16, 32\), got 4'),
        (dict(output_stride=24), ValueError, 'output_stride'),
        (dict(output_stride='8'), TypeError, "output_stride .* '8'"),
        (dict(output_stride=None), TypeError, 'output_stride'),
        (dict(output_stride=8, stem_patch_size=16), ValueError, 'stem_patch_size=16'),
    ],
)
def test_refused(settings, error, message):
    with pytest.raises(error, match=message):
        ConvNeXt('atto', **settings)
