"""Blocks and backbones that the tests of fused implementations run."""

import torch

from convnext_mm import ConvNeXt
from convnext_mm.models.block import select_impl
from convnext_mm.ops.weights import BlockWeights

SMALL = dict(depths=[1, 2, 3, 1], channels=[8, 16, 24, 32])
NAMES = ('x', *BlockWeights._fields)


def arguments(
    channels=24,
    size=(9, 11),
    samples=3,
    version=1,
    scale=1.0,
    dtype=torch.float32,
    kernel=7,
    seed=0,
):
    """Arguments of a block by name, the last sample's drop scale 0."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    c, m = channels, 4 * channels
    values = dict(
        x=randn(samples, c, *size).contiguous(memory_format=torch.channels_last),
        dwconv_weight=randn(c, 1, kernel, kernel) / kernel,
        dwconv_bias=randn(c) / 10,
        norm_weight=1 + randn(c) / 10,
        norm_bias=randn(c) / 10,
        pwconv1_weight=randn(m, c) / c**0.5,
        pwconv1_bias=randn(m) / 10,
        pwconv2_weight=randn(c, m) / m**0.5,
        pwconv2_bias=randn(c) / 10,
    )
    if version == 2:
        values.update(grn_gamma=randn(1, 1, 1, m), grn_beta=randn(1, 1, 1, m))
    elif scale is not None:
        values.update(gamma=scale * randn(c))
    values = {k: v.to(dtype).requires_grad_() for k, v in values.items()}
    drop_scale = torch.full((samples,), 1.25)
    drop_scale[-1] = 0
    return values, drop_scale


def call(block, values, drop_scale=None, **settings):
    """A block's output, of input and weights by name."""
    weights = BlockWeights(**{k: v for k, v in values.items() if k != 'x'})
    return block(values['x'], weights, drop_scale, **settings)


def run(impl, values, drop_scale, autocast=None, **settings):
    """Output and gradients by name, for one fixed output gradient."""
    values = {
        k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in values.items()
    }
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        block = select_impl(impl, values['x']).block
        out = call(block, values, drop_scale, **settings)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return dict(out=out.detach(), **{k: v.grad for k, v in values.items()})


def relative(value, reference):
    difference = (value.double() - reference.double()).abs().max()
    if difference == 0:  # of two zeros
        return 0.0
    return (difference / reference.double().abs().max()).item()


def assert_equals_eager(impl, values, drop_scale, **settings):
    expected = run('eager', values, drop_scale, **settings)
    got = run(impl, values, drop_scale, **settings)
    tight = values['x'].dtype == torch.float64
    for name, reference in expected.items():
        assert got[name].dtype == reference.dtype, name
        limit = 1e-12 if tight else 1e-5 if name == 'out' else 1e-4
        assert relative(got[name], reference) < limit, name


def run_backbone(impl, autocast=None, shape=(3, 3, 65, 100), **settings):
    """Outputs and gradients by name, on odd images with drop path."""
    torch.manual_seed(0)
    model = ConvNeXt(
        SMALL, drop_path_rate=0.3, layer_scale_init_value=1.0, impl=impl, **settings
    )
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        outs = model(torch.rand(shape))
    sum(
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in outs
    ).backward()
    return outs, {n: p.grad for n, p in model.named_parameters()}
