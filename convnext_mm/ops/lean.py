"""The ConvNeXt block with a backward of its own that stores little.

Autograd of the plain block keeps about 12 C values for each pixel. Here one
function is the whole block and keeps, of C channels and M hidden ones:

====================  =======  =========================================
kept                  values   for
====================  =======  =========================================
block input           C        gradient of the depthwise weight
depthwise output      C        LayerNorm, recomputed
pre-activation        M = 4 C  GELU and its derivative (``lean+``: not
                               kept, one more matrix product instead)
====================  =======  =========================================

in the dtype that the block computes in: 16-bit under autocast. Neither GELU's
output nor the block's last activation ``y`` is ever kept: with
``out = x + drop * gamma * y`` and ``y = W2 h + b2``, one product
``G = (drop * dout)^T h`` holds all of ``dW2 = diag(gamma) G`` and ``dgamma =
rowsum(G * W2) + b2 * sum(drop * dout)``. So layer scale costs no pass over
the map in either direction: forward it is a factor of the residual addition,
backward one of the cast of ``dout``. (Folding it into W2 would be a pass over
the weights at every step, which outnumber a late stage's pixels, and fp16
cannot hold weights times 1e-6.)

Both directions are custom operators, so that ``torch.compile`` sees one node
each. On a CPU they walk over the map in chunks that stay in the caches, and
pick the faster of two equal routes, :func:`_linear` and
:func:`_depthwise_weight_grad`.
"""
import functools
import math
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Pixels of a CPU chunk, for each thread. Fewer keep more in the caches, but
# oneDNN reorders the weights for each product: 1024 to 4096 were equally fast.
CHUNK_ROWS = 2048
# The largest output gradient that is used as one convolution kernel; larger
# maps are walked over in tiles of it.
TILE = (64, 32)
KEEP_NOTHING, KEEP_MAPS, KEEP_ALL = range(3)  # inference, lean+, lean
GRN_EPS = 1e-6  # of eager.grn


def block(x: Tensor,
          dwconv_weight: Tensor,
          dwconv_bias: Tensor,
          norm_weight: Tensor,
          norm_bias: Tensor,
          pwconv1_weight: Tensor,
          pwconv1_bias: Tensor,
          pwconv2_weight: Tensor,
          pwconv2_bias: Tensor,
          gamma: Optional[Tensor] = None,
          grn_gamma: Optional[Tensor] = None,
          grn_beta: Optional[Tensor] = None,
          drop_scale: Optional[Tensor] = None,
          *,
          eps: float = 1e-6,
          dilation: int = 1,
          keep: int = KEEP_ALL) -> Tensor:
    """:func:`convnext_mm.ops.eager.block` with little kept for backward.

    Args:
        keep: ``KEEP_ALL`` (``lean``) or ``KEEP_MAPS`` (``lean+``). The others
            are those of :func:`convnext_mm.ops.eager.block`.

    Returns:
        (N, C, H, W), of the dtype that eager gives.

    Raises:
        RuntimeError: In a second differentiation of the gradients.
    """
    tensors = (x, dwconv_weight, dwconv_bias, norm_weight, norm_bias,
               pwconv1_weight, pwconv1_bias, pwconv2_weight, pwconv2_bias,
               gamma, grn_gamma, grn_beta)
    if not (torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in tensors)):
        keep = KEEP_NOTHING
    return _forward_op(*tensors, drop_scale, eps, dilation,
                       compute_dtype(x), keep)[0]


block_plus = functools.partial(block, keep=KEEP_MAPS)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products and convolutions of ``x`` run in."""
    device = x.device.type
    # Autocast leaves fp64 alone, and a device may not know autocast.
    if (x.dtype != torch.float64 and device != 'meta'
            and torch.is_autocast_enabled(device)):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over channels or pixels run in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def out_dtype(x: Tensor, gamma: Optional[Tensor],
              dtype: torch.dtype) -> torch.dtype:
    """Eager's: layer scale and the input, in fp32 under autocast, promote."""
    if gamma is not None:
        dtype = torch.promote_types(dtype, gamma.dtype)
    return torch.promote_types(x.dtype, dtype)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of the output: that of ``x``; channels-last where ``x`` has neither."""
    cl = torch.channels_last
    plain = x.is_contiguous() and not x.is_contiguous(memory_format=cl)
    return torch.contiguous_format if plain else cl


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H * W, C), a view of the two common layouts."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _chunks(x: Tensor, whole_samples: bool) -> Iterator[Tuple[slice, slice]]:
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
    return (x.device.type == 'cpu' and x.numel() > 0
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled)


def _linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None,
            gelu: bool = False) -> Tensor:
    """(..., K) and (M, K) to (..., M), then GELU if asked for.

    PyTorch gives fp32 products to MKL, which is much slower than oneDNN on
    CPUs of another maker than its own. ``weight`` may be reordered for oneDNN.
    """
    if weight.is_mkldnn or (x.dtype == torch.float32 and onednn(x) and
                            hasattr(torch.ops.mkldnn, '_linear_pointwise')):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, 'gelu' if gelu else 'none', [],
            'none' if gelu else '')
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


def _layer_norm(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor],
                eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension; mean and 1 / std in fp32 at least."""
    if weight is not None:
        stat = _stat_dtype(x.dtype)
        weight, bias = weight.to(stat), bias.to(stat)
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def _grn_scale(h: Tensor, grn_gamma: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """What GRN (arXiv 2301.00808, eqs. 1-3) multiplies (N, P, M) with.

    Returns:
        ``scale``, ``norm`` (both (N, 1, M)) and ``mean`` of the norm plus eps
        (N, 1, 1): ``grn(h) = scale * h + beta``, ``scale = 1 + gamma * norm /
        mean``.
    """
    norm = torch.linalg.vector_norm(
        h, dim=1, keepdim=True, dtype=_stat_dtype(h.dtype))
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    return torch.addcmul(
        norm.new_ones(()), grn_gamma.to(norm.dtype).view(1, 1, -1),
        norm / mean), norm, mean


def _residual_scale(gamma: Optional[Tensor],
                    drop_scale: Optional[Tensor]) -> Optional[Tensor]:
    """Layer scale times drop scale, (N or 1, 1, C or 1), or None for 1."""
    if drop_scale is None:
        return None if gamma is None else gamma.view(1, 1, -1)
    drop_scale = drop_scale.view(-1, 1, 1)
    return drop_scale if gamma is None else drop_scale * gamma


def _of(scale: Optional[Tensor], samples: slice) -> Optional[Tensor]:
    """The part of (N or 1, 1, C) for some samples."""
    return scale if scale is None or len(scale) == 1 else scale[samples]


@torch.library.custom_op('convnext_mm::lean_forward', mutates_args=())
def _forward_op(
        x: Tensor, dwconv_weight: Tensor, dwconv_bias: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, pwconv1_weight: Tensor,
        pwconv1_bias: Tensor, pwconv2_weight: Tensor, pwconv2_bias: Tensor,
        gamma: Optional[Tensor], grn_gamma: Optional[Tensor],
        grn_beta: Optional[Tensor], drop_scale: Optional[Tensor], eps: float,
        dilation: int, dtype: torch.dtype,
        keep: int) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what backward needs: the input in the compute dtype
    (empty where that is ``x`` itself), the depthwise output and the
    pre-activation (N, H * W, M), each empty where ``keep`` says so.
    """
    with torch.autocast(x.device.type, enabled=False):
        cast = x.to(dtype)
        maps = depthwise(cast, dwconv_weight.to(dtype),
                         dwconv_bias.to(dtype), dilation)
        out = torch.empty_like(
            x, dtype=out_dtype(x, gamma, dtype),
            memory_format=memory_format(x))
        weights = [
            t.to(dtype) for t in (pwconv1_weight, pwconv1_bias,
                                  pwconv2_weight, pwconv2_bias)
        ]
        hidden = pointwise(
            rows(x), rows(maps), rows(out), norm_weight, norm_bias,
            *weights, _residual_scale(gamma, drop_scale), grn_gamma, grn_beta,
            eps, keep == KEEP_ALL)
        empty = x.new_empty(0)
        if keep == KEEP_NOTHING:
            return out, empty, empty.clone(), empty.clone()
        return (out, empty if dtype == x.dtype else cast, maps,
                empty.clone() if hidden is None else hidden)


def depthwise(x: Tensor, weight: Tensor, bias: Optional[Tensor],
              dilation: int) -> Tensor:
    """The depthwise convolution, in channels-last strides."""
    x = F.conv2d(
        x,
        weight,
        bias,
        padding=dilation * (weight.shape[-1] // 2),
        dilation=dilation,
        groups=len(weight))
    return x.contiguous(memory_format=torch.channels_last)


def pointwise(x: Tensor, maps: Tensor, out: Tensor,
              norm_weight: Optional[Tensor], norm_bias: Optional[Tensor],
              w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
              scale: Optional[Tensor], grn_gamma: Optional[Tensor],
              grn_beta: Optional[Tensor], eps: float,
              keep_hidden: bool) -> Optional[Tensor]:
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
    if grn_beta is not None:  # a constant before W2 is one after it
        stat = _stat_dtype(w2.dtype)
        b2 = torch.addmv(b2.to(stat), w2.to(stat),
                         grn_beta.to(stat).flatten()).to(w2.dtype)
    hidden = None
    if keep_hidden:
        hidden = _linear(
            _layer_norm(maps, norm_weight, norm_bias, eps)[0], w1, b1)
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


@_forward_op.register_fake
def _(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, pwconv1_weight,
      pwconv1_bias, pwconv2_weight, pwconv2_bias, gamma, grn_gamma, grn_beta,
      drop_scale, eps, dilation, dtype, keep):
    n, _, h, w = x.shape
    out = torch.empty_like(x, dtype=out_dtype(x, gamma, dtype),
                           memory_format=memory_format(x))
    cast = torch.empty_like(x, dtype=dtype)
    maps = torch.empty_like(cast, memory_format=torch.channels_last)
    hidden = cast.new_empty(n, h * w, len(pwconv1_weight))
    return (out,
            cast if keep and dtype != x.dtype else x.new_empty(0),
            maps if keep else x.new_empty(0),
            hidden if keep == KEEP_ALL else x.new_empty(0))


@register_flop_formula(torch.ops.convnext_mm.lean_forward)
def _block_flops(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias,
                 pwconv1_weight, *_, **__) -> int:
    """Of convolution and matrix products, as PyTorch counts the plain block's.
    """
    n, c, h, w = x
    kernel = dwconv_weight[2] * dwconv_weight[3]
    return 2 * n * h * w * c * (kernel + 2 * pwconv1_weight[0])


def _setup_context(ctx, inputs, output) -> None:
    x, dwconv_weight = inputs[:2]
    _, cast, maps, hidden = output
    ctx.mark_non_differentiable(cast, maps, hidden)
    ctx.set_materialize_grads(False)  # of the three: large zeros
    if not cast.numel():
        cast = x
    ctx.x_dtype = x.dtype
    ctx.settings = inputs[13:15]
    # The input serves the depthwise weight's gradient alone.
    ctx.save_for_backward(cast if dwconv_weight.requires_grad else None, maps,
                          hidden, *inputs[1:13])


def _backward(ctx, grad_out, *_):
    no_grads = (None, ) * 17
    if grad_out is None:
        return no_grads
    needs = list(ctx.needs_input_grad[:12])
    grads = _backward_op(grad_out, *ctx.saved_tensors, *ctx.settings,
                         ctx.x_dtype, needs)
    return tuple(g if need else None
                 for g, need in zip(grads, needs)) + no_grads[12:]


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op('convnext_mm::lean_backward', mutates_args=())
def _backward_op(
        grad_out: Tensor, x: Optional[Tensor], maps: Tensor, hidden: Tensor,
        dwconv_weight: Tensor, dwconv_bias: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, pwconv1_weight: Tensor, pwconv1_bias: Tensor,
        pwconv2_weight: Tensor, pwconv2_bias: Tensor, gamma: Optional[Tensor],
        grn_gamma: Optional[Tensor], grn_beta: Optional[Tensor],
        drop_scale: Optional[Tensor], eps: float, dilation: int,
        x_dtype: torch.dtype, needs: List[bool]) -> List[Tensor]:
    """Gradients of the input and the eleven parameters, in the order of
    ``block``'s arguments; empty where ``needs`` says that none is asked for.
    """
    with torch.autocast(maps.device.type, enabled=False):
        grads: List[Optional[Tensor]] = [None] * 12
        grad_maps = torch.empty_like(maps)
        grads[3:] = _pointwise_backward(
            rows(grad_out), rows(maps), hidden, rows(grad_maps),
            norm_weight, norm_bias, pwconv1_weight, pwconv1_bias,
            pwconv2_weight, pwconv2_bias, gamma, grn_gamma, grn_beta,
            drop_scale, eps, needs[3:])
        if needs[0]:
            # Same padding, stride 1: the gradient is the same convolution
            # with the kernel turned round.
            grad = depthwise(grad_maps,
                             dwconv_weight.to(maps.dtype).flip(2, 3), None,
                             dilation)
            if grad.dtype == grad_out.dtype == x_dtype:
                grads[0] = grad.add_(grad_out)
            else:
                grads[0] = torch.add(grad_out, grad).to(x_dtype)
        if needs[1]:
            grads[1] = _depthwise_weight_grad(x, grad_maps, dwconv_weight,
                                              dilation)
        if needs[2]:
            grads[2] = grad_maps.sum((0, 2, 3),
                                     dtype=_stat_dtype(maps.dtype))
        params = (None, dwconv_weight, dwconv_bias, norm_weight, norm_bias,
                  pwconv1_weight, pwconv1_bias, pwconv2_weight, pwconv2_bias,
                  gamma, grn_gamma, grn_beta)
        return [
            maps.new_empty(0) if not need else
            grad if param is None else _as_parameter(grad, param)
            for grad, param, need in zip(grads, params, needs)
        ]


def _as_parameter(grad: Tensor, param: Tensor) -> Tensor:
    """In dtype, shape and strides of ``param``: compiled code relies on what
    the operator's fake announces. (Convolutions of small maps give others.)"""
    grad = grad.to(param.dtype).view_as(param)
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


class _Sum:
    """Sums partial results in fp32 at least."""

    def __init__(self) -> None:
        self.value = None

    def add(self, part: Tensor) -> None:
        if self.value is None:
            self.value = part.to(_stat_dtype(part.dtype))
        else:
            self.value.add_(part)


def _pointwise_backward(
        grad_out: Tensor, maps: Tensor, hidden: Tensor, grad_maps: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor,
        bias1: Tensor, weight2: Tensor, bias2: Tensor,
        gamma: Optional[Tensor], grn_gamma: Optional[Tensor],
        grn_beta: Optional[Tensor], drop_scale: Optional[Tensor], eps: float,
        needs: Sequence[bool]) -> List[Optional[Tensor]]:
    """Backward of :func:`pointwise`; writes into ``grad_maps``.

    Returns:
        Gradients of LayerNorm's weight and bias, W1, b1, W2, b2, gamma and
        GRN's gamma and beta, None where ``needs`` has no use for them.
    """
    dtype, channels = maps.dtype, maps.shape[2]
    w1, b1, w2 = (t.to(dtype) for t in (weight1, bias1, weight2))
    scale = _residual_scale(gamma, drop_scale)
    need_norm, need_1 = any(needs[:2]), any(needs[2:4])
    need_2, need_grn = any(needs[4:7]), any(needs[7:])
    # gamma is left out of G's factor: dgamma needs G, and may be 0 itself.
    range_ = _power_of_two(grad_out) if dtype == torch.float16 else None
    g_scale = drop_scale.view(-1, 1, 1) if drop_scale is not None else None
    if range_ is not None:
        g_scale = 1 / range_ if g_scale is None else g_scale / range_
    d_norm_weight, d_norm_bias, d_w1, d_b1 = _Sum(), _Sum(), _Sum(), _Sum()
    g, g_sum, d_grn_gamma, d_z = _Sum(), _Sum(), _Sum(), _Sum()

    for part in _chunks(maps, whole_samples=grn_gamma is not None):
        normed, mean, rstd = _layer_norm(maps[part], norm_weight, norm_bias,
                                         eps)
        a = hidden[part] if hidden.numel() else _linear(normed, w1, b1)
        dy = grad_out[part]
        d_h = _linear(_scaled(dy, _of(scale, part[0]), dtype), w2.t())
        if need_2 or grn_gamma is not None:
            h = F.gelu(a)
        if grn_gamma is not None:
            if need_grn:
                d_z.add(d_h.sum((0, 1), dtype=_stat_dtype(dtype)))
            h, d_h, d_scale = _grn_backward(h, d_h, grn_gamma, grn_beta)
            d_grn_gamma.add(d_scale)
        if need_2:
            dy = _scaled(dy, _of(g_scale, part[0]), dtype)
            g.add(_product(dy, h))
            g_sum.add(dy.sum((0, 1), dtype=_stat_dtype(dtype)))
        d_a = torch.ops.aten.gelu_backward.grad_input(d_h, a, grad_input=d_h)
        if need_1:
            d_w1.add(_product(d_a, normed))
            d_b1.add(d_a.sum((0, 1), dtype=_stat_dtype(dtype)))
        d_normed = _linear(d_a, w1.t())
        stat = _stat_dtype(dtype)
        d_maps, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            d_normed, maps[part], [channels], mean, rstd,
            norm_weight.to(stat), norm_bias.to(stat),
            [True, need_norm, need_norm])
        grad_maps[part] = d_maps
        if need_norm:
            d_norm_weight.add(d_weight)
            d_norm_bias.add(d_bias)

    d_w2 = d_b2 = d_gamma = None
    if need_2:
        d_w2, d_b2 = g.value, g_sum.value
        if range_ is not None:
            d_w2, d_b2 = d_w2.mul_(range_[0]), d_b2.mul_(range_[0, 0])
        if gamma is not None:
            factor = gamma.to(d_b2.dtype)
            if needs[6]:
                d_gamma = torch.addcmul(
                    _row_dot(d_w2, weight2.to(d_w2.dtype)), d_b2,
                    bias2.to(d_b2.dtype))
            d_w2, d_b2 = d_w2.mul_(factor[:, None]), d_b2 * factor
    return [
        d_norm_weight.value, d_norm_bias.value, d_w1.value, d_b1.value, d_w2,
        d_b2, d_gamma, d_grn_gamma.value, d_z.value
    ]


def _scaled(x: Tensor, scale: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """``x * scale`` in ``dtype``, contiguous."""
    x = x if scale is None else x * scale
    return x.to(dtype).contiguous()


def _power_of_two(x: Tensor) -> Tensor:
    """The power of two just below the largest magnitude, (1, 1, 1); 1 where
    that is 0 or not finite.

    fp16 has too little range for gradients that layer scale or drop path have
    not been applied to; divided by this they fit.
    """
    top = x.abs().amax().float() if x.numel() else x.new_zeros(())
    top = top.view(1, 1, 1)
    power = torch.exp2(torch.floor(torch.log2(top)))
    return torch.where(torch.isfinite(power) & (power > 0), power,
                       torch.ones_like(power))


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot products of (C, M) and (C, M), with no (C, M) temporary."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``sum_rows a^T b``: (..., A) and (..., B), contiguous, to (A, B)."""
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    if a.dtype == torch.float32 and onednn(a):
        return _linear(a.t(), b.t())
    return torch.mm(a.t(), b)


def _grn_backward(h: Tensor, d_z: Tensor, grn_gamma: Tensor,
                  grn_beta: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Backward of GRN of ``h`` (N, P, M), given its output's gradient.

    Returns:
        GRN's output, the gradient of ``h``, and GRN's gamma's (M,).
    """
    scale, norm, mean = _grn_scale(h, grn_gamma)
    grn_gamma = grn_gamma.to(norm.dtype).view(1, 1, -1)
    d_scale = (d_z.to(norm.dtype) * h).sum(1, keepdim=True)
    d_response = d_scale * grn_gamma / mean
    d_norm = d_response - (d_response * norm).mean(-1, keepdim=True) / mean
    # The norm of a map of zeros gets no gradient, as in vector_norm.
    d_norm = torch.where(norm > 0, d_norm / norm, torch.zeros_like(norm))
    d_h = torch.addcmul(d_z * scale, h, d_norm).to(h.dtype)
    z = torch.addcmul(grn_beta.to(norm.dtype).view(1, 1, -1), h,
                      scale).to(h.dtype)
    return z, d_h, (d_scale * norm / mean).sum((0, 1))


def _depthwise_weight_grad(x: Tensor, grad: Tensor, weight: Tensor,
                           dilation: int) -> Tensor:
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
            grad, x, weight.to(x.dtype), None, [1, 1], [pad, pad],
            [dilation, dilation], False, [0, 0], channels,
            [False, True, False])[1]
    x = F.pad(x.float(), [pad] * 4)
    grad = grad.float()
    total = _Sum()
    height, width = grad.shape[2:]
    for n in range(len(grad)):
        for top, bottom in _tiles(height, TILE[0]):
            for left, right in _tiles(width, TILE[1]):
                total.add(F.conv2d(
                    x[n:n + 1, :, top:bottom + 2 * pad,
                      left:right + 2 * pad],
                    grad[n, :, None, top:bottom, left:right],
                    stride=dilation,
                    groups=channels))
    return total.value.view(channels, 1, size, size)


def _tiles(size: int, largest: int) -> Iterator[Tuple[int, int]]:
    """``size`` in equal parts (start, end), none above ``largest``."""
    count = -(-size // largest)
    step = -(-size // count)
    for start in range(0, size, step):
        yield start, min(start + step, size)


@register_flop_formula(torch.ops.convnext_mm.lean_backward)
def _block_backward_flops(grad_out, x, maps, hidden, *params, **_) -> int:
    """Twice the forward's, and ``lean+``'s recomputed matrix product."""
    flops = 2 * _block_flops(grad_out, *params)
    if hidden[0] == 0:
        n, c, h, w = grad_out
        flops += 2 * n * h * w * c * params[4][0]
    return flops


@_backward_op.register_fake
def _(grad_out, x, maps, hidden, *rest):
    params, (x_dtype, needs) = rest[:11], rest[-2:]
    grads = [torch.empty_like(maps, dtype=x_dtype)]
    grads += [p if p is None else torch.empty_like(p) for p in params]
    return [g if need else maps.new_empty(0) for g, need in zip(grads, needs)]


def _refuse(ctx, *_):
    raise RuntimeError(
        "the gradients of impl 'lean' and 'lean+' of ConvNeXt cannot be "
        "differentiated again; use impl='eager' for that")


_backward_op.register_autograd(_refuse)


def downsample(x: Tensor,
               norm_weight: Tensor,
               norm_bias: Tensor,
               conv_weight: Tensor,
               conv_bias: Tensor,
               *,
               eps: float = 1e-6,
               stride: Sequence[int] = (2, 2),
               padding: Sequence[int] = (0, 0),
               dilation: Sequence[int] = (1, 1)) -> Tensor:
    """:func:`convnext_mm.ops.eager.downsample`; keeps its input only, which
    the norm of an emitted map keeps too, and recomputes LayerNorm.

    Raises:
        RuntimeError: In a second differentiation of the gradients.
    """
    return _downsample_op(x, norm_weight, norm_bias, conv_weight, conv_bias,
                          eps, stride, padding, dilation, compute_dtype(x))


@torch.library.custom_op('convnext_mm::lean_downsample', mutates_args=())
def _downsample_op(x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                   conv_weight: Tensor, conv_bias: Tensor, eps: float,
                   stride: Sequence[int], padding: Sequence[int],
                   dilation: Sequence[int], dtype: torch.dtype) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        normed = _layer_norm(
            x.permute(0, 2, 3, 1), norm_weight, norm_bias, eps)[0]
        out = F.conv2d(
            normed.permute(0, 3, 1, 2).to(dtype), conv_weight.to(dtype),
            conv_bias.to(dtype), stride, padding, dilation)
        return out.contiguous(memory_format=torch.channels_last)


@_downsample_op.register_fake
def _(x, norm_weight, norm_bias, conv_weight, conv_bias, eps, stride, padding,
      dilation, dtype):
    sizes = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in zip(
        x.shape[2:], padding, dilation, conv_weight.shape[2:], stride)]
    out = x.new_empty(len(x), len(conv_weight), *sizes, dtype=dtype)
    return out.contiguous(memory_format=torch.channels_last)


@register_flop_formula(torch.ops.convnext_mm.lean_downsample)
def _downsample_flops(x, norm_weight, norm_bias, conv_weight, *_, out_shape,
                      **__) -> int:
    n, _, h, w = out_shape
    return 2 * n * h * w * math.prod(conv_weight)


def _downsample_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[5:]


def _downsample_backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:5])
    grads = _downsample_backward_op(grad, *ctx.saved_tensors, *ctx.settings,
                                    needs)
    return tuple(g if need else None
                 for g, need in zip(grads, needs)) + (None, ) * 5


_downsample_op.register_autograd(
    _downsample_backward, setup_context=_downsample_setup_context)


@torch.library.custom_op(
    'convnext_mm::lean_downsample_backward', mutates_args=())
def _downsample_backward_op(
        grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        conv_weight: Tensor, eps: float, stride: Sequence[int],
        padding: Sequence[int], dilation: Sequence[int], dtype: torch.dtype,
        needs: List[bool]) -> List[Tensor]:
    """Gradients of the input and the four parameters; empty where ``needs``
    says that none is asked for."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.permute(0, 2, 3, 1)
        normed, mean, rstd = _layer_norm(x, norm_weight, norm_bias, eps)
        d_normed, d_weight, d_bias = torch.ops.aten.convolution_backward(
            grad, normed.permute(0, 3, 1, 2).to(dtype), conv_weight.to(dtype),
            [len(conv_weight)], stride, padding, dilation, False, [0, 0], 1,
            [any(needs[:3]), needs[3], needs[4]])
        grads = [None, None, None, d_weight, d_bias]
        if any(needs[:3]):
            stat = _stat_dtype(x.dtype)
            grads[:3] = torch.ops.aten.native_layer_norm_backward(
                d_normed.permute(0, 2, 3, 1).to(x.dtype), x, x.shape[3:],
                mean, rstd, norm_weight.to(stat), norm_bias.to(stat),
                needs[:3])
        if needs[0]:
            grads[0] = grads[0].permute(0, 3, 1, 2)
        params = (None, norm_weight, norm_bias, conv_weight,
                  conv_weight.new_empty(len(conv_weight)))
        return [
            x.new_empty(0) if not need else
            grad.to(x.dtype) if param is None else _as_parameter(grad, param)
            for grad, param, need in zip(grads, params, needs)
        ]


@register_flop_formula(torch.ops.convnext_mm.lean_downsample_backward)
def _downsample_backward_flops(grad, x, norm_weight, norm_bias, conv_weight,
                               *_, **__) -> int:
    n, _, h, w = grad
    return 4 * n * h * w * math.prod(conv_weight)


@_downsample_backward_op.register_fake
def _(grad, x, norm_weight, norm_bias, conv_weight, eps, stride, padding,
      dilation, dtype, needs):
    grads = (torch.empty_like(x, memory_format=torch.channels_last),
             torch.empty_like(norm_weight), torch.empty_like(norm_bias),
             torch.empty_like(conv_weight),
             conv_weight.new_empty(len(conv_weight)))
    return [g if need else x.new_empty(0) for g, need in zip(grads, needs)]


_downsample_backward_op.register_autograd(_refuse)
