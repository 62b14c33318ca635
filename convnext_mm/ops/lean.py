"""The lean ConvNeXt block in plain PyTorch operators, see :mod:`.fused`.

On a CPU it walks over the map in chunks that stay in the caches, and picks the
faster of two equal routes, :func:`_linear` and :func:`depthwise_weight_grad`.

Layer scale is not folded into W2: that would be a pass over the weights at
every step, which outnumber a late stage's pixels, and fp16 cannot hold weights
times 1e-6.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_mm.private_names import has

from .define import define_block, define_downsample
from .fused import (
    KEEP_ALL,
    KEEP_MAPS,
    KEEP_NOTHING,
    bias_with_beta,
    g_scale,
    grn_factor_grads,
    grn_factors,
    memory_format,
    out_dtype,
    pwconv2_grads,
    residual_scale,
    rows,
    scaled,
    stat_dtype,
)
from .weights import BlockNeeds, BlockWeights

# Pixels of a CPU chunk, for each thread. Fewer keep more in the caches, but
# oneDNN reorders the weights for each product: 1024 to 4096 were equally fast.
CHUNK_ROWS = 2048
# The largest output gradient that is used as one convolution kernel; larger
# maps are walked over in tiles of it.
TILE = (64, 32)


def available() -> bool:
    """Whether this PyTorch has the backward passes that blocks here call."""
    names = ('native_layer_norm_backward', 'convolution_backward', 'gelu_backward')
    return all(has(f'torch.ops.aten.{name}') for name in names)


def _chunks(x: Tensor, whole_samples: bool) -> Iterator[tuple[slice, slice]]:
    """Pieces (samples, pixels) of (N, P, C): rows of one sample or, where maps
    are small or ``whole_samples`` says so, whole samples. On a GPU, where a
    launch costs more than a cache miss, all in one.
    """
    samples, pixels = x.shape[:2]
    rows = samples * pixels
    if x.device.type == 'cpu':
        rows = CHUNK_ROWS * torch.get_num_threads()
    if samples and pixels > rows and not whole_samples:
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
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
    )


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == 'AVX512'


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False
) -> Tensor:
    """(..., K) and (M, K) to (..., M), then GELU if asked for.

    PyTorch gives fp32 products to MKL, which with AVX512 is much slower than oneDNN on
    CPUs of another maker than its own. Without AVX512 oneDNN is the slower where an
    operand is transposed, and its GELU is slower than PyTorch's. ``weight`` may be
    reordered for oneDNN.
    """
    fused = gelu and _has_avx512()
    if weight.is_mkldnn or (
        x.dtype == torch.float32
        and onednn(x)
        and has('torch.ops.mkldnn._linear_pointwise')
        and (_has_avx512() or weight.is_contiguous())
    ):
        x = torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, 'gelu' if fused else 'none', [], 'none' if fused else ''
        )
    else:
        x, fused = F.linear(x, weight, bias), False
    if not gelu or fused:
        return x
    return torch.ops.aten.gelu_(x) if has('torch.ops.aten.gelu_') else F.gelu(x)


def _layer_norm(
    x: Tensor, affine: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension; mean and 1 / std in fp32 at least.

    Args:
        affine: Weight and bias, or None for 1 and 0.
    """
    weight = bias = None
    if affine is not None:
        stat = stat_dtype(x.dtype)
        weight, bias = affine[0].to(stat), affine[1].to(stat)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    statistics: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, weight and bias; None where not needed."""
    stat = stat_dtype(x.dtype)
    weight, bias = affine[0].to(stat), affine[1].to(stat)
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], *statistics, weight, bias, needs
    )


def _grn_scale(h: Tensor, grn_gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`.fused.grn_factors` of (N, P, M), and the norm."""
    norm = torch.linalg.vector_norm(h, dim=1, keepdim=True, dtype=stat_dtype(h.dtype))
    return (*grn_factors(norm, grn_gamma), norm)


def _of(scale: Tensor | None, samples: slice) -> Tensor | None:
    """The part of (N or 1, 1, C) for some samples."""
    return scale if scale is None or len(scale) == 1 else scale[samples]


class Packed(NamedTuple):
    """A block's weights as :func:`run` takes them, in the dtype to compute in but
    for ``norm`` and ``grn_gamma``. Shapes are those of :class:`.BlockWeights`."""

    dwconv_weight: Tensor
    dwconv_bias: Tensor
    norm: tuple[Tensor, Tensor] | None  # weight and bias, None for 1 and 0
    w1: Tensor  # this and w2: maybe reordered for oneDNN
    b1: Tensor
    w2: Tensor
    b2: Tensor  # with GRN's beta in it
    grn_gamma: Tensor | None


def _forward(
    x: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    dilation: int,
    dtype: torch.dtype,
    keep: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`.define.define_block` asks for it."""
    w2 = weights.pwconv2_weight.to(dtype)
    packed = Packed(
        weights.dwconv_weight.to(dtype),
        weights.dwconv_bias.to(dtype),
        (weights.norm_weight, weights.norm_bias),
        weights.pwconv1_weight.to(dtype),
        weights.pwconv1_bias.to(dtype),
        w2,
        bias_with_beta(weights.pwconv2_bias.to(dtype), w2, weights.grn_beta),
        weights.grn_gamma,
    )
    scale = residual_scale(weights.gamma, drop_scale)
    return run(
        x, packed, scale, out_dtype(x, weights.gamma, dtype), eps, dilation, keep
    )


def run(
    x: Tensor,
    packed: Packed,
    scale: Tensor | None,
    dtype: torch.dtype,
    eps: float,
    dilation: int,
    keep: int = KEEP_NOTHING,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What :func:`.define.define_block` wants of forward, the output first.

    Args:
        x: (N, C, H, W).
        scale: Of the residual branch, (N or 1, 1, C or 1), None for 1.
        dtype: Of the output.
    """
    cast = x
    if x.dtype != packed.b1.dtype:
        cast = x.to(packed.b1.dtype, memory_format=torch.channels_last)
    maps = depthwise(cast, packed.dwconv_weight, packed.dwconv_bias, dilation)
    kept = cast if keep else None
    del cast
    out = torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
    hidden = _pointwise(
        rows(x), rows(maps), rows(out), packed, scale, eps, keep == KEEP_ALL
    )
    return (out, kept, maps, hidden) if keep else (out, None, None, None)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The depthwise convolution of (N, C, H, W), in channels-last strides."""
    x = F.conv2d(
        x,
        weight,
        bias,
        padding=dilation * (weight.shape[-1] // 2),
        dilation=dilation,
        groups=len(weight),
    )
    return x.contiguous(memory_format=torch.channels_last)


def _pointwise(
    x: Tensor,
    maps: Tensor,
    out: Tensor,
    packed: Packed,
    scale: Tensor | None,
    eps: float,
    keep_hidden: bool,
) -> Tensor | None:
    """All after the depthwise convolution, written into ``out``.

    Args:
        x, maps, out: (N, P, C), the block's input, the depthwise output and
            the block's output.
        scale: See :func:`run`.

    Returns:
        The pre-activation (N, P, M) with ``keep_hidden``, else None.
    """
    hidden = None
    if keep_hidden:
        hidden = _linear(_layer_norm(maps, packed.norm, eps)[0], packed.w1, packed.b1)
    for part in _chunks(maps, whole_samples=packed.grn_gamma is not None):
        if hidden is None:
            h = _layer_norm(maps[part], packed.norm, eps)[0]
            h = _linear(h, packed.w1, packed.b1, gelu=True)
        else:
            h = F.gelu(hidden[part])
        if packed.grn_gamma is not None:
            h.mul_(_grn_scale(h, packed.grn_gamma)[0])
        y = _linear(h, packed.w2, packed.b2)
        factor = _of(scale, part[0])
        if factor is None:
            torch.add(x[part], y, out=out[part])
        else:
            torch.addcmul(x[part], y, factor, out=out[part])
    return hidden


class _Sums(dict[str, Tensor]):
    """Sums of partial results by name, in fp32 at least."""

    def add(self, name: str, part: Tensor) -> None:
        if name in self:
            self[name].add_(part)
        else:
            self[name] = part.to(stat_dtype(part.dtype))

    def add_linear(self, layer: str, grad: Tensor, x: Tensor) -> None:
        """Gradients of a linear layer's weight and bias, (..., B) and (..., A) to
        (B, A) and (B,): of its output's gradient and its input."""
        self.add(f'{layer}_weight', _product(grad, x))
        self.add(f'{layer}_bias', grad.sum((0, 1), dtype=stat_dtype(grad.dtype)))


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
    """As :func:`.define.define_block` asks for it."""
    grad_maps = torch.empty_like(maps)
    grads = _pointwise_backward(
        rows(grad_out),
        rows(maps),
        hidden,
        rows(grad_maps),
        weights,
        drop_scale,
        eps,
        needs,
    )
    if needs.x:
        # Same padding, stride 1: the gradient is the same convolution with
        # the kernel turned round.
        kernel = weights.dwconv_weight.to(maps.dtype).flip(2, 3)
        grad = depthwise(grad_maps, kernel, None, dilation)
        if grad.dtype == grad_out.dtype == x_dtype:
            grads['x'] = grad.add_(grad_out)
        else:
            grads['x'] = torch.add(grad, grad_out).to(x_dtype)
    if x is not None:
        grads['dwconv_weight'] = depthwise_weight_grad(
            x, grad_maps, weights.dwconv_weight, dilation
        )
    if needs.dwconv_bias:
        grads['dwconv_bias'] = grad_maps.sum((0, 2, 3), dtype=stat_dtype(maps.dtype))
    return grads


def _pointwise_backward(
    grad_out: Tensor,
    maps: Tensor,
    hidden: Tensor,
    grad_maps: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None,
    eps: float,
    needs: BlockNeeds,
) -> dict[str, Tensor]:
    """Backward of :func:`_pointwise`; writes into ``grad_maps``.

    Returns:
        Gradients by name of all weights after the depthwise convolution.
    """
    dtype, affine = maps.dtype, (weights.norm_weight, weights.norm_bias)
    w1, b1 = weights.pwconv1_weight.to(dtype), weights.pwconv1_bias.to(dtype)
    w2 = weights.pwconv2_weight.to(dtype)
    dy_scale = residual_scale(weights.gamma, drop_scale)
    dg_scale, power = g_scale(grad_out, drop_scale, dtype)
    need_norm = needs.norm_weight or needs.norm_bias
    need_1 = needs.pwconv1_weight or needs.pwconv1_bias
    need_2 = needs.pwconv2_weight or needs.pwconv2_bias or needs.gamma
    sums = _Sums()
    for part in _chunks(maps, whole_samples=weights.grn_gamma is not None):
        normed, *statistics = _layer_norm(maps[part], affine, eps)
        a = hidden[part] if hidden.numel() else _linear(normed, w1, b1)
        dy = grad_out[part]
        d_h = _linear(scaled(dy, _of(dy_scale, part[0]), dtype), w2.t())
        if need_2 or weights.grn_gamma is not None:
            h = F.gelu(a)
        if weights.grn_gamma is not None:
            h, d_h = _grn_backward(h, d_h, weights, needs, sums)
        if need_2:
            sums.add_linear('pwconv2', scaled(dy, _of(dg_scale, part[0]), dtype), h)
        d_a = torch.ops.aten.gelu_backward.grad_input(d_h, a, grad_input=d_h)
        if need_1:
            sums.add_linear('pwconv1', d_a, normed)
        grad_maps[part], d_weight, d_bias = _layer_norm_backward(
            _linear(d_a, w1.t()),
            maps[part],
            affine,
            statistics,
            [True, need_norm, need_norm],
        )
        if need_norm:
            sums.add('norm_weight', d_weight)
            sums.add('norm_bias', d_bias)
    if need_2:
        g, g_sum = sums['pwconv2_weight'], sums['pwconv2_bias']
        sums.update(pwconv2_grads(g, g_sum, power, weights, needs.gamma))
    return sums


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``sum_rows a^T b``: (..., A) and (..., B), contiguous, to (A, B)."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    if a.dtype == torch.float32 and onednn(a) and _has_avx512():
        return _linear(a.t(), b.t())
    return torch.mm(a.t(), b)


def _grn_backward(
    h: Tensor, d_z: Tensor, weights: BlockWeights, needs: BlockNeeds, sums: _Sums
) -> tuple[Tensor, Tensor]:
    """GRN's output, and the gradient of its input ``h`` (N, P, M), given that of
    its output; adds to the gradients of its weights."""
    gamma, beta = weights.grn_gamma, weights.grn_beta
    assert gamma is not None and beta is not None
    if needs.grn_gamma or needs.grn_beta:
        sums.add('grn_beta', d_z.sum((0, 1), dtype=stat_dtype(d_z.dtype)))
    scale, mean, norm = _grn_scale(h, gamma)
    d_scale = (d_z.to(norm.dtype) * h).sum(1, keepdim=True)
    d_norm, d_gamma = grn_factor_grads(d_scale, gamma, norm, mean)
    sums.add('grn_gamma', d_gamma)
    d_h = torch.addcmul(d_z * scale, h, d_norm).to(h.dtype)
    z = torch.addcmul(beta.to(norm.dtype).view(1, 1, -1), h, scale).to(h.dtype)
    return z, d_h


def depthwise_weight_grad(
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
    height, width = grad.shape[2:]
    parts = (
        F.conv2d(
            x[n : n + 1, :, top : bottom + 2 * pad, left : right + 2 * pad],
            grad[n, :, None, top:bottom, left:right],
            stride=dilation,
            groups=channels,
        )
        for n in range(len(grad))
        for top, bottom in _tiles(height, TILE[0])
        for left, right in _tiles(width, TILE[1])
    )
    return functools.reduce(Tensor.add_, parts).view(channels, 1, size, size)


def _tiles(size: int, largest: int) -> Iterator[tuple[int, int]]:
    """``size`` in equal parts (start, end), none above ``largest``."""
    count = -(-size // largest)
    step = -(-size // count)
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = _layer_norm(x, (weight, bias), eps)
    return normed.to(dtype), mean, rstd


def _norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    needs: list[bool],
    *statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.to(x.dtype)
    return _layer_norm_backward(grad, x, (weight, bias), statistics, needs)


block = define_block('lean', _forward, _backward)
block_plus = functools.partial(block, keep=KEEP_MAPS)
downsample = define_downsample('lean', _norm, _norm_backward)
