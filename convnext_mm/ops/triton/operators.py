"""The ConvNeXt block on a GPU: Triton kernels around PyTorch's matrix
products, or with them where that is measured to be faster. See :mod:`..fused`
for what is kept for backward.

Forward, each line one kernel: depthwise convolution, bias and LayerNorm; W1
and GELU; W2, layer scale, drop path and residual. Backward: W2, GELU's
derivative and b1's gradient; W1; LayerNorm, its parameters' gradients, and its
output again; the depthwise convolution's weight and bias; its input and the
residual; and two matrix products for the pointwise weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fused import (
    KEEP_NOTHING,
    bias_with_beta,
    define_block,
    define_downsample,
    grn_factor_grads,
    grn_factors,
    layer_scale_grads,
    memory_format,
    out_dtype,
    power_of_two,
    refuse_double_backward,
    residual_scale,
    rows,
    scaled,
)
from . import launch


def _map(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W, C), contiguous: no copy if channels-last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _forward(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    gamma: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    dilation: int,
    dtype: torch.dtype,
    keep: int,
) -> tuple[Tensor | None, ...]:
    """As :func:`..fused.define_block` asks for it."""
    x_map = _map(x)
    cast = x_map.to(dtype)
    maps, normed = launch.depthwise(
        cast,
        dwconv_weight,
        dwconv_bias,
        dilation,
        norm=(norm_weight, norm_bias, eps),
        keep_maps=keep != KEEP_NOTHING,
    )
    normed = normed.flatten(1, 2)
    w1, b1, w2, b2 = (
        t.to(dtype)
        for t in (pwconv1_weight, pwconv1_bias, pwconv2_weight, pwconv2_bias)
    )
    if grn_gamma is None:
        h, hidden = launch.linear_gelu(normed, w1, b1, keep != KEEP_NOTHING)
    else:
        hidden = F.linear(normed, w1, b1)
        scale, _ = grn_factors(_norm(hidden), grn_gamma)
        h = launch.gelu_scaled(hidden, scale)
        b2 = bias_with_beta(b2, w2, grn_beta)
    del normed
    out = launch.linear_residual(
        h,
        w2,
        b2,
        x_map.flatten(1, 2),
        residual_scale(gamma, drop_scale),
        out_dtype(x, gamma, dtype),
    )
    n, channels, height, width = x.shape
    out = out.view(n, height, width, channels).permute(0, 3, 1, 2)
    out = out.contiguous(memory_format=memory_format(x))
    if keep == KEEP_NOTHING:
        return out, None, None, None
    # Of the input itself nothing new is kept.
    cast = None if dtype == x.dtype else cast.permute(0, 3, 1, 2)
    return out, cast, maps.permute(0, 3, 1, 2), hidden


def _norm(hidden: Tensor) -> Tensor:
    """Of GELU's output over the map: (N, P, M) to (N, 1, M), fp32."""
    return launch.gelu_sums(hidden, None)[0].sqrt()


def _sum_product(a: Tensor, b: Tensor) -> Tensor:
    """``sum over pixels of a^T b``, (N, P, A) and (N, P, B) to (A, B), fp32.

    Where PyTorch can leave it in fp32 it is never rounded to 16 bit, which for
    the sums of a large map would overflow in fp16.
    """
    a, b = a.flatten(0, 1).t(), b.flatten(0, 1)
    if (
        a.is_cuda
        and a.dtype != torch.float32
        and 'dtype' in torch.ops.aten.mm.overloads()
    ):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()


def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    maps: Tensor,
    hidden: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    gamma: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    dilation: int,
    x_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor | None]:
    """As :func:`..fused.define_block` asks for it."""
    dtype = maps.dtype
    need_w1, need_w2 = any(needs[5:7]), any(needs[7:10])
    grads: list[Tensor | None] = [None] * 12
    grad_map = _map(grad_out)
    grad_rows = grad_map.flatten(1, 2)
    w2 = pwconv2_weight.to(dtype)
    drop = None if drop_scale is None else drop_scale.view(-1, 1, 1)
    unscale = None
    if dtype == torch.float16:
        # No range for weights times a small gamma: gradients are scaled, for
        # G by a power of two that brings them into range.
        dy = scaled(grad_rows, residual_scale(gamma, drop_scale), dtype)
        unscale = power_of_two(grad_rows)
        dy_g = scaled(grad_rows, 1 / unscale if drop is None else drop / unscale, dtype)
    else:
        dy = dy_g = scaled(grad_rows, drop, dtype)
        if gamma is not None:
            w2 = (gamma[:, None] * pwconv2_weight).to(dtype)

    if grn_gamma is None:
        d_hidden, h, grads[6] = launch.linear_gelu_backward(dy, w2, hidden, need_w2)
    else:
        d_z = F.linear(dy, w2.t())
        norm = _norm(hidden)
        scale, mean = grn_factors(norm, grn_gamma)
        d_scale, d_beta = launch.gelu_sums(hidden, d_z)
        d_norm, grads[10] = grn_factor_grads(d_scale, grn_gamma, norm, mean)
        grads[11] = d_beta.sum((0, 1))
        d_hidden, h, grads[6] = launch.gelu_backward(
            d_z, hidden, need_w2, (scale, d_norm, grn_beta)
        )
        del d_z
    del dy
    if need_w2:
        g = _sum_product(dy_g, h)
        g_sum = dy_g.sum((0, 1), dtype=torch.float32)
        if unscale is not None:
            g, g_sum = g.mul_(unscale[0]), g_sum.mul_(unscale[0, 0])
        grads[7:10] = layer_scale_grads(
            g, g_sum, gamma, pwconv2_weight, pwconv2_bias, needs[9]
        )
    del h, dy_g

    d_normed = F.linear(d_hidden, pwconv1_weight.to(dtype).t())
    # The normalised map takes the place of its gradient.
    normed = d_normed if need_w1 else None
    d_maps, grads[3], grads[4] = launch.layer_norm_backward(
        d_normed, rows(maps).contiguous(), norm_weight, norm_bias, eps, normed
    )
    if need_w1:
        grads[5] = _sum_product(d_hidden, normed)
    del d_hidden, d_normed, normed

    d_maps = d_maps.view(grad_map.shape)
    if needs[0]:
        grads[0] = launch.depthwise(
            d_maps,
            dwconv_weight,
            None,
            dilation,
            residual=grad_map,
            flip=True,
            out_dtype=x_dtype,
        )[0].permute(0, 3, 1, 2)
    if needs[1]:
        grads[1:3] = launch.depthwise_weight_grad(
            _map(x), d_maps, dwconv_weight.shape[-1], dilation
        )
    elif needs[2]:
        grads[2] = d_maps.sum((0, 1, 2), dtype=torch.float32)
    return grads


def _norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor]:
    """(N, H, W, C), as :func:`..fused.define_downsample` asks for it."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    launch.layer_norm(x.flatten(1, 2), weight, bias, eps, out)
    return (out,)


def _norm_rows_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, needs: list[bool]
) -> tuple[Tensor | None, ...]:
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


@torch.library.custom_op('convnext_mm::triton_norm', mutates_args=())
def _norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty_like(x, dtype=dtype, memory_format=_format(channels_last))
    with torch.cuda.device_of(x):
        launch.layer_norm(rows(x).contiguous(), weight, bias, eps, out, channels_last)
    return out


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@_norm_op.register_fake
def _(x, weight, bias, eps, channels_last, dtype):
    return torch.empty_like(x, dtype=dtype, memory_format=_format(channels_last))


def _norm_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _norm_backward(ctx, grad):
    grads = _norm_backward_op(grad, *ctx.saved_tensors, ctx.eps)
    return (
        *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)),
        None,
        None,
        None,
    )


_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup_context)


@torch.library.custom_op('convnext_mm::triton_norm_backward', mutates_args=())
def _norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Heads hand back what they were given: either layout.
    plain = grad.is_contiguous()
    grad = grad if plain else grad.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    with torch.cuda.device_of(x):
        d_x, d_weight, d_bias = launch.layer_norm_backward(
            grad, rows(x).contiguous(), weight, bias, eps, grad_last=not plain
        )
    d_x = d_x.view(n, height, width, channels).permute(0, 3, 1, 2)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


@_norm_backward_op.register_fake
def _(grad, x, weight, bias, eps):
    return (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(weight),
        torch.empty_like(bias),
    )


_norm_backward_op.register_autograd(refuse_double_backward)
