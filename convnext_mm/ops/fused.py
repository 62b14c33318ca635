"""A ConvNeXt block as one operator with a backward of its own: the arithmetic
that the implementations of that kind share. :mod:`.define` makes the operators.

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
backward one of the cast of ``dout``.
"""

import torch
from torch import Tensor

from .weights import BlockWeights

KEEP_NOTHING, KEEP_MAPS, KEEP_ALL = range(3)  # inference, lean+, the others
GRN_EPS = 1e-6  # of eager.grn


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products and convolutions of ``x`` run in."""
    device = x.device.type
    # Autocast leaves fp64 alone, and a device may not know autocast.
    if (
        x.dtype != torch.float64
        and device != 'meta'
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over channels or pixels run in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def out_dtype(x: Tensor, gamma: Tensor | None, dtype: torch.dtype) -> torch.dtype:
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


def residual_scale(gamma: Tensor | None, drop_scale: Tensor | None) -> Tensor | None:
    """Layer scale times drop scale, (N or 1, 1, C or 1), or None for 1."""
    if drop_scale is None:
        return None if gamma is None else gamma.view(1, 1, -1)
    drop_scale = drop_scale.view(-1, 1, 1)
    return drop_scale if gamma is None else drop_scale * gamma


def scaled(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x * scale`` in ``dtype``, contiguous."""
    x = x if scale is None else x * scale
    return x.to(dtype).contiguous()


def power_of_two(x: Tensor) -> Tensor:
    """The power of two just below the largest magnitude, (1, 1, 1); 1 where
    that is 0 or not finite.

    fp16 has too little range for gradients that layer scale or drop path have
    not been applied to; divided by this they fit.
    """
    largest = (
        torch.linalg.vector_norm(x, float('inf')) if x.numel() else x.new_zeros(())
    )
    top = largest.float().view(1, 1, 1)
    power = torch.exp2(torch.floor(torch.log2(top)))
    return torch.where(
        torch.isfinite(power) & (power > 0), power, torch.ones_like(power)
    )


def bias_with_beta(bias: Tensor, weight: Tensor, grn_beta: Tensor | None) -> Tensor:
    """W2's bias with GRN's beta in it: a constant before W2 is one after it."""
    if grn_beta is None:
        return bias
    stat = stat_dtype(weight.dtype)
    return torch.addmv(bias.to(stat), weight.to(stat), grn_beta.to(stat).flatten()).to(
        weight.dtype
    )


def g_scale(
    grad_out: Tensor, drop_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What ``dout`` is multiplied with for G, see the head of this module.

    gamma is left out: its gradient needs G, and it may be 0 itself.

    Args:
        grad_out: (N, P, C).

    Returns:
        The factor, (N or 1, 1, 1) or None for 1, and what it was divided by:
        None, or in fp16 a :func:`power_of_two`.
    """
    scale = None if drop_scale is None else drop_scale.view(-1, 1, 1)
    if dtype != torch.float16:
        return scale, None
    power = power_of_two(grad_out)
    return (1 / power if scale is None else scale / power), power


def pwconv2_grads(
    g: Tensor,
    g_sum: Tensor,
    power: Tensor | None,
    weights: BlockWeights,
    need_gamma: bool,
) -> dict[str, Tensor]:
    """Gradients of W2, b2 and gamma by name, see the head of this module.

    Args:
        g: (C, M), ``(drop * dout)^T h``; overwritten.
        g_sum: (C,), ``sum(drop * dout)``; overwritten.
        power: What both were divided by, see :func:`g_scale`.
    """
    if power is not None:
        g, g_sum = g.mul_(power[0]), g_sum.mul_(power[0, 0])
    if weights.gamma is None:
        return dict(pwconv2_weight=g, pwconv2_bias=g_sum)
    grads = {}
    if need_gamma:  # row-wise dot products, with no (C, M) temporary
        weight = weights.pwconv2_weight.to(g.dtype)
        dot = torch.bmm(g.unsqueeze(1), weight.unsqueeze(2)).flatten()
        bias = weights.pwconv2_bias.to(g_sum.dtype)
        grads['gamma'] = torch.addcmul(dot, g_sum, bias)
    factor = weights.gamma.to(g_sum.dtype)
    grads.update(pwconv2_weight=g.mul_(factor[:, None]), pwconv2_bias=g_sum * factor)
    return grads


def grn_factors(norm: Tensor, grn_gamma: Tensor) -> tuple[Tensor, Tensor]:
    """What GRN (arXiv 2301.00808, eqs. 1-3) multiplies (N, P, M) with.

    Args:
        norm: (N, 1, M), over the map, fp32 at least.
        grn_gamma: M values.

    Returns:
        ``scale`` (N, 1, M), and ``mean`` of the norm plus eps (N, 1, 1):
        ``grn(h) = scale * h + beta``, ``scale = 1 + gamma * norm / mean``.
    """
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    return torch.addcmul(
        norm.new_ones(()), grn_gamma.to(norm.dtype).view(1, 1, -1), norm / mean
    ), mean


def grn_factor_grads(
    d_scale: Tensor, grn_gamma: Tensor, norm: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Backward of :func:`grn_factors`.

    Args:
        d_scale: (N, 1, M), gradient of ``scale``.

    Returns:
        What ``h`` is multiplied with for its gradient through the norm,
        (N, 1, M), and the gradient of gamma (M,).
    """
    d_response = d_scale * grn_gamma.to(norm.dtype).view(1, 1, -1) / mean
    d_norm = d_response - (d_response * norm).mean(-1, keepdim=True) / mean
    # The norm of a map of zeros gets no gradient, as in vector_norm.
    d_norm = torch.where(norm > 0, d_norm / norm, torch.zeros_like(norm))
    return d_norm, (d_scale * norm / mean).sum((0, 1))
