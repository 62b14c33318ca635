"""The lean ConvNeXt block in plain PyTorch operators, see :mod:`.fused`.

On a CPU it walks over the map in chunks that stay in the caches, and picks the
faster of two equal routes, :func:`_linear` and :func:`_depthwise_weight_grad`.

Layer scale is not folded into W2: that would be a pass over the weights at
every step, which outnumber a late stage's pixels, and fp16 cannot hold weights
times 1e-6.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import (
    KEEP_ALL,
    KEEP_MAPS,
    bias_with_beta,
    define_block,
    define_downsample,
    grn_factor_grads,
    grn_factors,
    layer_scale_grads,
    memory_format,
    out_dtype,
    power_of_two,
    residual_scale,
    rows,
    scaled,
    stat_dtype,
)

# Pixels of a CPU chunk, for each thread. Fewer keep more in the caches, but
# oneDNN reorders the weights for each product: 1024 to 4096 were equally fast.
CHUNK_ROWS = 2048
# The largest output gradient that is used as one convolution kernel; larger
# maps are walked over in tiles of it.
TILE = (64, 32)


def _chunks(x: Tensor, whole_samples: bool) -> Iterator[tuple[slice, slice]]:
    """Pieces (samples, pixels) of (N, P, C): rows of one sample or, where maps
    are small or ``whole_samples`` says so, whole samples. On a GPU, where a
    launch costs more than a cache miss, all in one.
    """
    samples, pixels = x.shape[:2]
    rows = samples * pixels
    if x.device.type == 'cpu':
        rows = CHUNK_ROWS * torch.get_num_threads()
    if pixels > rows and not whole_samples:
        for n in range(samples):
            for p in range(0, pixels, rows):
                yield slice(n, n + 1), slice(p, p + rows)
    else:
        step = max(1, rows // max(1, pixels))
        for n in range(0, max(1, samples), step):
            yield slice(n, n + step), slice(None)


def onednn(x: Tensor) -> bool:
    """Whether oneDNN's own operators take over from PyTorch's choice."""
    return (
        x.device.type == 'cpu'
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """(..., K) and (M, K) to (..., M), then GELU if asked for.

    PyTorch gives fp32 products to MKL, which is much slower than oneDNN on
    CPUs of another maker than its own. ``weight`` may be reordered for oneDNN.
    """
    if weight.is_mkldnn or (
        x.dtype == torch.float32
        and onednn(x)
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    ):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, 'gelu' if gelu else 'none', [], 'none' if gelu else ''
        )
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension; mean and 1 / std in fp32 at least."""
    if weight is not None:
        stat = stat_dtype(x.dtype)
        weight, bias = weight.to(stat), bias.to(stat)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _grn_scale(h: Tensor, grn_gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.fused.grn_factors` of (N, P, M), and the norm."""
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=stat_dtype(h.dtype))
    return (*grn_factors(norm, grn_gamma), norm)


def _of(scale: Tensor | None, samples: slice) -> Tensor | None:
    """The part of (N or 1, 1, C) for some samples."""
    return scale if scale is None or len(scale) == 1 else scale[samples]


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
    """As :func:`.fused.define_block` asks for it."""
    cast = x.to(dtype)
    maps = depthwise(cast, dwconv_weight.to(dtype), dwconv_bias.to(dtype), dilation)
    out = torch.empty_like(
        x, dtype=out_dtype(x, gamma, dtype), memory_format=memory_format(x)
    )
    weights = [
        t.to(dtype)
        for t in (pwconv1_weight, pwconv1_bias, pwconv2_weight, pwconv2_bias)
    ]
    hidden = pointwise(
        rows(x),
        rows(maps),
        rows(out),
        norm_weight,
        norm_bias,
        *weights,
        residual_scale(gamma, drop_scale),
        grn_gamma,
        grn_beta,
        eps,
        keep == KEEP_ALL,
    )
    return (out, cast, maps, hidden) if keep else (out, None, None, None)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The depthwise convolution, in channels-last strides."""
    x = F.conv2d(
        x,
        weight,
        bias,
        padding=dilation * (weight.shape[-1] // 2),
        dilation=dilation,
        groups=len(weight),
    )
    return x.contiguous(memory_format=torch.channels_last)


def pointwise(
    x: Tensor,
    maps: Tensor,
    out: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    scale: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    eps: float,
    keep_hidden: bool,
) -> Tensor | None:
    """All after the depthwise convolution, written into ``out``.

    Args:
        x, maps, out: (N, P, C), the block's input, the depthwise output and
            the block's output.
        norm_weight, norm_bias: (C,), LayerNorm's, or None for 1 and 0.
        w1, b1, w2, b2: In the dtype of ``maps``.
        scale: Of the residual branch, (N or 1, 1, C or 1).

    Returns:
        The pre-activation (N, P, M) with ``keep_hidden``, else None.
    """
    b2 = bias_with_beta(b2, w2, grn_beta)
    hidden = None
    if keep_hidden:
        hidden = _linear(_layer_norm(maps, norm_weight, norm_bias, eps)[0], w1, b1)
    for part in _chunks(maps, whole_samples=grn_gamma is not None):
        if hidden is None:
            h = _layer_norm(maps[part], norm_weight, norm_bias, eps)[0]
            h = _linear(h, w1, b1, gelu=True)
        else:
            h = F.gelu(hidden[part])
        if grn_gamma is not None:
            h.mul_(_grn_scale(h, grn_gamma)[0])
        y = _linear(h, w2, b2)
        if scale is None:
            torch.add(x[part], y, out=out[part])
        else:
            torch.addcmul(x[part], y, _of(scale, part[0]), out=out[part])
    return hidden


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
    """As :func:`.fused.define_block` asks for it."""
    grads: list[Tensor | None] = [None] * 12
    grad_maps = torch.empty_like(maps)
    grads[3:] = _pointwise_backward(
        rows(grad_out),
        rows(maps),
        hidden,
        rows(grad_maps),
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        pwconv2_weight,
        pwconv2_bias,
        gamma,
        grn_gamma,
        grn_beta,
        drop_scale,
        eps,
        needs[3:],
    )
    if needs[0]:
        # Same padding, stride 1: the gradient is the same convolution with
        # the kernel turned round.
        grad = depthwise(
            grad_maps, dwconv_weight.to(maps.dtype).flip(2, 3), None, dilation
        )
        if grad.dtype == grad_out.dtype == x_dtype:
            grads[0] = grad.add_(grad_out)
        else:
            grads[0] = torch.add(grad_out, grad).to(x_dtype)
    if needs[1]:
        grads[1] = _depthwise_weight_grad(x, grad_maps, dwconv_weight, dilation)
    if needs[2]:
        grads[2] = grad_maps.sum((0, 2, 3), dtype=stat_dtype(maps.dtype))
    return grads


class _Sum:
    """Sums partial results in fp32 at least."""

    def __init__(self) -> None:
        self.value = None

    def add(self, part: Tensor) -> None:
        if self.value is None:
            self.value = part.to(stat_dtype(part.dtype))
        else:
            self.value.add_(part)


def _pointwise_backward(
    grad_out: Tensor,
    maps: Tensor,
    hidden: Tensor,
    grad_maps: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gamma: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    drop_scale: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Backward of :func:`pointwise`; writes into ``grad_maps``.

    Returns:
        Gradients of LayerNorm's weight and bias, W1, b1, W2, b2, gamma and
        GRN's gamma and beta, None where ``needs`` has no use for them.
    """
    dtype, channels = maps.dtype, maps.shape[2]
    w1, b1, w2 = (t.to(dtype) for t in (weight1, bias1, weight2))
    scale = residual_scale(gamma, drop_scale)
    need_norm, need_1 = any(needs[:2]), any(needs[2:4])
    need_2, need_grn = any(needs[4:7]), any(needs[7:])
    # gamma is left out of G's factor: dgamma needs G, and may be 0 itself.
    range_ = power_of_two(grad_out) if dtype == torch.float16 else None
    g_scale = drop_scale.view(-1, 1, 1) if drop_scale is not None else None
    if range_ is not None:
        g_scale = 1 / range_ if g_scale is None else g_scale / range_
    d_norm_weight, d_norm_bias, d_w1, d_b1 = _Sum(), _Sum(), _Sum(), _Sum()
    g, g_sum, d_grn_gamma, d_z = _Sum(), _Sum(), _Sum(), _Sum()

    for part in _chunks(maps, whole_samples=grn_gamma is not None):
        normed, mean, rstd = _layer_norm(maps[part], norm_weight, norm_bias, eps)
        a = hidden[part] if hidden.numel() else _linear(normed, w1, b1)
        dy = grad_out[part]
        d_h = _linear(scaled(dy, _of(scale, part[0]), dtype), w2.t())
        if need_2 or grn_gamma is not None:
            h = F.gelu(a)
        if grn_gamma is not None:
            if need_grn:
                d_z.add(d_h.sum((0, 1), dtype=stat_dtype(dtype)))
            h, d_h, d_scale = _grn_backward(h, d_h, grn_gamma, grn_beta)
            d_grn_gamma.add(d_scale)
        if need_2:
            dy = scaled(dy, _of(g_scale, part[0]), dtype)
            g.add(_product(dy, h))
            g_sum.add(dy.sum((0, 1), dtype=stat_dtype(dtype)))
        d_a = torch.ops.aten.gelu_backward.grad_input(d_h, a, grad_input=d_h)
        if need_1:
            d_w1.add(_product(d_a, normed))
            d_b1.add(d_a.sum((0, 1), dtype=stat_dtype(dtype)))
        d_normed = _linear(d_a, w1.t())
        stat = stat_dtype(dtype)
        d_maps, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed,
            maps[part],
            [channels],
            mean,
            rstd,
            norm_weight.to(stat),
            norm_bias.to(stat),
            [True, need_norm, need_norm],
        )
        grad_maps[part] = d_maps
        if need_norm:
            d_norm_weight.add(d_weight)
            d_norm_bias.add(d_bias)

    d_w2 = d_b2 = d_gamma = None
    if need_2:
        d_w2, d_b2 = g.value, g_sum.value
        if range_ is not None:
            d_w2, d_b2 = d_w2.mul_(range_[0]), d_b2.mul_(range_[0, 0])
        d_w2, d_b2, d_gamma = layer_scale_grads(
            d_w2, d_b2, gamma, weight2, bias2, needs[6]
        )
    return [
        d_norm_weight.value,
        d_norm_bias.value,
        d_w1.value,
        d_b1.value,
        d_w2,
        d_b2,
        d_gamma,
        d_grn_gamma.value,
        d_z.value,
    ]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``sum_rows a^T b``: (..., A) and (..., B), contiguous, to (A, B)."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    if a.dtype == torch.float32 and onednn(a):
        return _linear(a.t(), b.t())
    return torch.mm(a.t(), b)


def _grn_backward(
    h: Tensor, d_z: Tensor, grn_gamma: Tensor, grn_beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of GRN of ``h`` (N, P, M), given its output's gradient.

    Returns:
        GRN's output, the gradient of ``h``, and GRN's gamma's (M,).
    """
    scale, mean, norm = _grn_scale(h, grn_gamma)
    d_scale = (d_z.to(norm.dtype) * h).sum(1, keepdim=True)
    d_norm, d_gamma = grn_factor_grads(d_scale, grn_gamma, norm, mean)
    d_h = torch.addcmul(d_z * scale, h, d_norm).to(h.dtype)
    z = torch.addcmul(grn_beta.to(norm.dtype).view(1, 1, -1), h, scale).to(h.dtype)
    return z, d_h, d_gamma


def _depthwise_weight_grad(
    x: Tensor, grad: Tensor, weight: Tensor, dilation: int
) -> Tensor:
    """(C, 1, K, K) gradient of the depthwise weight, of (N, C, H, W) maps.

    On a CPU oneDNN's own weight gradient can need a hundred times what the
    forward convolution takes. But the gradient is itself a depthwise
    convolution, ``dw[c, i, j] = sum_hw x[c, h + i d, w + j d] grad[c, h, w]``,
    of the padded input with the output's gradient as kernel, K x K outputs
    and stride d; this runs at forward speed, in fp32.
    """
    channels, _, size, _ = weight.shape
    pad = dilation * (size // 2)
    if x.dtype == torch.float64 or not onednn(x):
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight.to(x.dtype),
            None,
            [1, 1],
            [pad, pad],
            [dilation, dilation],
            False,
            [0, 0],
            channels,
            [False, True, False],
        )[1]
    x = F.pad(x.float(), [pad] * 4)
    grad = grad.float()
    total = _Sum()
    height, width = grad.shape[2:]
    for n in range(len(grad)):
        for top, bottom in _tiles(height, TILE[0]):
            for left, right in _tiles(width, TILE[1]):
                total.add(
                    F.conv2d(
                        x[n : n + 1, :, top : bottom + 2 * pad, left : right + 2 * pad],
                        grad[n, :, None, top:bottom, left:right],
                        stride=dilation,
                        groups=channels,
                    )
                )
    return total.value.view(channels, 1, size, size)


def _tiles(size: int, largest: int) -> Iterator[tuple[int, int]]:
    """``size`` in equal parts (start, end), none above ``largest``."""
    count = -(-size // largest)
    step = -(-size // count)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = _layer_norm(x, weight, bias, eps)
    return normed.to(dtype), mean, rstd


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    needs: list[bool],
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor | None, ...]:
    stat = stat_dtype(x.dtype)
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype),
        x,
        x.shape[3:],
        mean,
        rstd,
        weight.to(stat),
        bias.to(stat),
        needs,
    )


block = define_block('lean', _forward, _backward)
block_plus = functools.partial(block, keep=KEEP_MAPS)
downsample = define_downsample('lean', _norm, _norm_backward)
