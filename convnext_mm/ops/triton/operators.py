"""The ConvNeXt block on a GPU: Triton kernels around PyTorch's matrix
products, or with them where that is measured to be faster. See :mod:`..fused`
for what is kept for backward.

Forward, each line one kernel: depthwise convolution, bias and LayerNorm; W1
and GELU; W2, layer scale, drop path and residual. Backward: W2, GELU's
derivative and b1's gradient; W1; LayerNorm, its parameters' gradients, and its
output again; the depthwise convolution's weight and bias; its input and the
residual; and two matrix products for the pointwise weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..define import define_block, define_downsample, define_operator, on_device_of
from ..fused import (
    KEEP_NOTHING,
    bias_with_beta,
    g_scale,
    grn_factor_grads,
    grn_factors,
    memory_format,
    out_dtype,
    residual_scale,
    rows,
)
from ..weights import BlockNeeds, BlockWeights
from . import launch


def _map(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W, C), contiguous: no copy if channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _forward(
    x: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    dilation: int,
    dtype: torch.dtype,
    keep: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`..define.define_block` asks for it."""
    x_map = _map(x)
    convolution = (weights.dwconv_weight, weights.dwconv_bias, dilation, dtype)
    cast = None
    if keep != KEEP_NOTHING and dtype != x.dtype:
        maps, cast = launch.depthwise_and_cast(x_map, *convolution)
    else:
        maps = launch.depthwise(x_map, *convolution)
    norm = (weights.norm_weight, weights.norm_bias, eps)
    maps_rows = maps.flatten(1, 2)
    normed = launch.layer_norm(maps_rows, *norm, torch.empty_like(maps_rows))
    w1, w2 = weights.pwconv1_weight.to(dtype), weights.pwconv2_weight.to(dtype)
    b1, b2 = weights.pwconv1_bias, weights.pwconv2_bias
    hidden: Tensor | None
    if weights.grn_gamma is None:
        h, hidden = launch.linear_gelu(normed, w1, b1, keep != KEEP_NOTHING)
    else:
        hidden = F.linear(normed, w1, b1.to(dtype))
        scale, _ = grn_factors(_norm(hidden), weights.grn_gamma)
        h = launch.gelu_scaled(hidden, scale)
        b2 = bias_with_beta(b2.to(dtype), w2, weights.grn_beta)
    del normed
    out = launch.linear_residual(
        h,
        w2,
        b2,
        x_map.flatten(1, 2),
        weights.gamma,
        drop_scale,
        out_dtype(x, weights.gamma, dtype),
    )
    n, channels, height, width = x.shape
    out = out.view(n, height, width, channels).permute(0, 3, 1, 2)
    out = out.contiguous(memory_format=memory_format(x))
    if keep == KEEP_NOTHING:
        return out, None, None, None
    kept = None if cast is None else cast.permute(0, 3, 1, 2)
    return out, kept, maps.permute(0, 3, 1, 2), hidden


def _norm(hidden: Tensor) -> Tensor:
    """Of GELU's output over the map: (N, P, M) to (N, 1, M), fp32."""
    return launch.gelu_sums(hidden, None)[0].sqrt()


def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    maps: Tensor,
    hidden: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    dilation: int,
    x_dtype: torch.dtype,
    needs: BlockNeeds,
) -> dict[str, Tensor]:
    """As :func:`..define.define_block` asks for it."""
    grad_map = _map(grad_out)
    d_maps, grads = _pointwise_backward(
        grad_map.flatten(1, 2), maps, hidden, weights, drop_scale, eps, needs
    )
    d_maps = d_maps.view(grad_map.shape)
    if needs.x:
        grads['x'] = launch.depthwise_input_grad(
            d_maps, weights.dwconv_weight, dilation, grad_map, x_dtype
        ).permute(0, 3, 1, 2)
    if x is not None:
        grads['dwconv_weight'], grads['dwconv_bias'] = launch.depthwise_weight_grad(
            _map(x), d_maps, weights.dwconv_weight, dilation
        )
    elif needs.dwconv_bias:
        grads['dwconv_bias'] = d_maps.sum((0, 1, 2), dtype=torch.float32)
    return grads


def _pointwise_backward(
    grad_out: Tensor,
    maps: Tensor,
    hidden: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    needs: BlockNeeds,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient of the depthwise output (N, P, C), and by name those of all
    weights after it. ``grad_out`` is (N, P, C)."""
    dtype = maps.dtype
    maps_rows = rows(maps).contiguous()
    need_1 = needs.pwconv1_weight or needs.pwconv1_bias
    need_2 = needs.pwconv2_weight or needs.pwconv2_bias or needs.gamma
    dg_scale, power = g_scale(grad_out, drop_scale, dtype)
    dg, dg_sums = launch.scaled(grad_out, dg_scale, dtype, sums=need_2)
    w2 = weights.pwconv2_weight
    if dtype == torch.float16:  # no range for weights times a small gamma
        scale = residual_scale(weights.gamma, drop_scale)
        dy, _ = launch.scaled(grad_out, scale, dtype)
    else:
        dy = dg
        if weights.gamma is not None:
            w2 = weights.gamma[:, None] * w2
    w2 = w2.to(dtype)
    d_hidden, h, grads = _hidden_backward(dy, w2, hidden, weights, need_2)
    del dy
    if h is not None:
        assert dg_sums is not None
        g = launch.sum_product(dg, h)
        grads.update(launch.pwconv2_grads(g, dg_sums, power, weights, needs.gamma))
    del h, dg

    w1 = weights.pwconv1_weight.to(dtype)
    d_normed = torch.mm(d_hidden.flatten(0, 1), w1).view(maps_rows.shape)
    # The normalised map takes the place of its gradient.
    normed = d_normed if need_1 else None
    d_maps, grads['norm_weight'], grads['norm_bias'] = launch.layer_norm_backward(
        d_normed, maps_rows, weights.norm_weight, weights.norm_bias, eps, normed
    )
    if normed is not None:
        grads['pwconv1_weight'] = launch.sum_product(d_hidden, normed).sum(0)
    return d_maps, grads


def _hidden_backward(
    dy: Tensor, w2: Tensor, hidden: Tensor, weights: BlockWeights, keep: bool
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Backward of GELU, GRN and W2.

    Args:
        dy: (N, P, C), the gradient of W2's output.
        w2: (C, M), in the dtype of ``dy``.
        hidden: (N, P, M), the pre-activation.

    Returns:
        The gradient of ``hidden``; with ``keep`` W2's input, else None; and by
        name the gradients of b1 and GRN's weights.
    """
    if weights.grn_gamma is None:
        d_hidden, h, d_bias = launch.linear_gelu_backward(dy, w2, hidden, keep)
        return d_hidden, h, dict(pwconv1_bias=d_bias)
    assert weights.grn_beta is not None
    d_z = F.linear(dy, w2.t())
    norm = _norm(hidden)
    scale, mean = grn_factors(norm, weights.grn_gamma)
    d_scale, d_beta = launch.gelu_sums(hidden, d_z)
    d_norm, d_gamma = grn_factor_grads(d_scale, weights.grn_gamma, norm, mean)
    d_hidden, h, d_bias = launch.gelu_backward(
        d_z, hidden, keep, (scale, d_norm, weights.grn_beta)
    )
    grads = dict(pwconv1_bias=d_bias, grn_gamma=d_gamma, grn_beta=d_beta.sum((0, 1)))
    return d_hidden, h, grads


def _norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor]:
    """(N, H, W, C), as :func:`..define.define_downsample` asks for it."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    launch.layer_norm(x.flatten(1, 2), weight, bias, eps, out)
    return (out,)


def _norm_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    d_x, d_weight, d_bias = launch.layer_norm_backward(
        grad.contiguous().flatten(1, 2), x.flatten(1, 2), weight, bias, eps
    )
    return d_x.view(x.shape), d_weight, d_bias


block = define_block('triton', _forward, _backward)
downsample = define_downsample('triton', _norm_rows, _norm_rows_backward)


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, channels_last: bool
) -> Tensor:
    """:func:`convnext_mm.ops.eager.norm`; keeps its input only."""
    # Autocast runs LayerNorm in fp32 on GPUs; on CPUs it leaves it alone.
    autocast = x.is_cuda and torch.is_autocast_enabled('cuda')
    dtype = torch.float32 if autocast else x.dtype
    return _norm_op(x, weight, bias, eps, channels_last, dtype)


def _run_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = _fake_norm(x, weight, bias, eps, channels_last, dtype)
    with on_device_of(x):
        launch.layer_norm(rows(x).contiguous(), weight, bias, eps, out, channels_last)
    return out


def _fake_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    strides = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=strides)


def _setup_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps, *_ = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _norm_backward_op(grad, *ctx.saved_tensors, ctx.eps)
    needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad))
    return (*needed, None, None, None)


def _run_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Heads hand back what they were given: either layout.
    plain = grad.is_contiguous()
    grad = grad if plain else grad.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    with on_device_of(x):
        d_x, d_weight, d_bias = launch.layer_norm_backward(
            grad, rows(x).contiguous(), weight, bias, eps, grad_last=not plain
        )
    d_x = d_x.view(n, height, width, channels).permute(0, 3, 1, 2)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _fake_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(weight),
        torch.empty_like(bias),
    )


_norm_backward_op = define_operator(
    'triton_norm_backward', _run_norm_backward, _fake_norm_backward
)
_norm_op = define_operator(
    'triton_norm',
    _run_norm,
    _fake_norm,
    setup_context=_setup_norm_context,
    backward=_norm_backward,
)
