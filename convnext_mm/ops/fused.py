"""A ConvNeXt block as one operator with a backward of its own: what the
implementations of that kind share.

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

Both directions are custom operators, so that ``torch.compile`` sees one node
each.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

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
    top = x.abs().amax().float() if x.numel() else x.new_zeros(())
    top = top.view(1, 1, 1)
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


def layer_scale_grads(
    g: Tensor,
    g_sum: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    need_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of W2, b2 and gamma, see the head of this module.

    Args:
        g: (C, M), ``(drop * dout)^T h``; overwritten.
        g_sum: (C,), ``sum(drop * dout)``.
        weight, bias: W2 (C, M) and b2 (C,).
    """
    if gamma is None:
        return g, g_sum, None
    d_gamma = None
    if need_gamma:  # row-wise dot products, with no (C, M) temporary
        dot = torch.bmm(g.unsqueeze(1), weight.to(g.dtype).unsqueeze(2))
        d_gamma = torch.addcmul(dot.flatten(), g_sum, bias.to(g_sum.dtype))
    factor = gamma.to(g_sum.dtype)
    return g.mul_(factor[:, None]), g_sum * factor, d_gamma


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


@contextlib.contextmanager
def _undisturbed_on(x: Tensor) -> Iterator[None]:
    """No autocast, and kernels start on the device of ``x``."""
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def define_block(
    name: str, forward: Callable, backward: Callable
) -> Callable[..., Tensor]:
    """A block from its two directions, as the custom operators
    ``convnext_mm::{name}_forward`` and ``_backward``.

    Args:
        forward: Has the arguments of ``forward_op`` below, runs without
            autograd and autocast. Gives the output, and what backward needs:
            the input in the compute dtype (where it is another than that of
            ``x``), the depthwise output, and the pre-activation (N, H * W, M);
            each may be None where ``keep`` says so.
        backward: Has the arguments of ``backward_op``. Gives gradients of the
            input and the eleven parameters, in any floating dtype, None or
            anything else where ``needs`` says that none is asked for.

    Returns:
        A function with the signature of :func:`convnext_mm.ops.eager.block`
        and ``keep``: ``KEEP_ALL``, or ``KEEP_MAPS`` to recompute the
        pre-activation.
    """

    @torch.library.custom_op(f'convnext_mm::{name}_forward', mutates_args=())
    def forward_op(
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with _undisturbed_on(x):
            out, *kept = forward(
                x,
                dwconv_weight,
                dwconv_bias,
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
                dilation,
                dtype,
                keep,
            )
        # An operator may return neither None nor one of its inputs.
        return (out, *(x.new_empty(0) if t is None or t is x else t for t in kept))

    @forward_op.register_fake
    def _(
        x,
        dwconv_weight,
        dwconv_bias,
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
        dilation,
        dtype,
        keep,
    ):
        n, _, h, w = x.shape
        out = torch.empty_like(
            x, dtype=out_dtype(x, gamma, dtype), memory_format=memory_format(x)
        )
        cast = torch.empty_like(x, dtype=dtype)
        maps = torch.empty_like(cast, memory_format=torch.channels_last)
        hidden = cast.new_empty(n, h * w, len(pwconv1_weight))
        return (
            out,
            cast if keep and dtype != x.dtype else x.new_empty(0),
            maps if keep else x.new_empty(0),
            hidden if keep == KEEP_ALL else x.new_empty(0),
        )

    @torch.library.custom_op(f'convnext_mm::{name}_backward', mutates_args=())
    def backward_op(
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
    ) -> list[Tensor]:
        params = (
            None,
            dwconv_weight,
            dwconv_bias,
            norm_weight,
            norm_bias,
            pwconv1_weight,
            pwconv1_bias,
            pwconv2_weight,
            pwconv2_bias,
            gamma,
            grn_gamma,
            grn_beta,
        )
        with _undisturbed_on(maps):
            grads = backward(
                grad_out,
                x,
                maps,
                hidden,
                *params[1:],
                drop_scale,
                eps,
                dilation,
                x_dtype,
                needs,
            )
            return [
                maps.new_empty(0)
                if not need
                else grad
                if param is None
                else _as_parameter(grad, param)
                for grad, param, need in zip(grads, params, needs)
            ]

    @backward_op.register_fake
    def _(grad_out, x, maps, hidden, *rest):
        params, (x_dtype, needs) = rest[:11], rest[-2:]
        grads = [torch.empty_like(maps, dtype=x_dtype)]
        grads += [p if p is None else torch.empty_like(p) for p in params]
        return [g if need else maps.new_empty(0) for g, need in zip(grads, needs)]

    def setup_context(ctx, inputs, output) -> None:
        x, dwconv_weight = inputs[:2]
        _, cast, maps, hidden = output
        ctx.mark_non_differentiable(cast, maps, hidden)
        ctx.set_materialize_grads(False)  # of the three: large zeros
        if not cast.numel():
            cast = x
        ctx.x_dtype = x.dtype
        ctx.settings = inputs[13:15]
        # The input serves the depthwise weight's gradient alone.
        ctx.save_for_backward(
            cast if dwconv_weight.requires_grad else None, maps, hidden, *inputs[1:13]
        )

    def run_backward(ctx, grad_out, *_):
        no_grads = (None,) * 17
        if grad_out is None:
            return no_grads
        needs = list(ctx.needs_input_grad[:12])
        grads = backward_op(
            grad_out, *ctx.saved_tensors, *ctx.settings, ctx.x_dtype, needs
        )
        return (
            tuple(g if need else None for g, need in zip(grads, needs)) + no_grads[12:]
        )

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    backward_op.register_autograd(refuse_double_backward)
    operators = torch.ops.convnext_mm
    register_flop_formula(getattr(operators, f'{name}_forward'))(_block_flops)
    register_flop_formula(getattr(operators, f'{name}_backward'))(_block_backward_flops)

    def block(
        x: Tensor,
        dwconv_weight: Tensor,
        dwconv_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        pwconv1_weight: Tensor,
        pwconv1_bias: Tensor,
        pwconv2_weight: Tensor,
        pwconv2_bias: Tensor,
        gamma: Tensor | None = None,
        grn_gamma: Tensor | None = None,
        grn_beta: Tensor | None = None,
        drop_scale: Tensor | None = None,
        *,
        eps: float = 1e-6,
        dilation: int = 1,
        keep: int = KEEP_ALL,
    ) -> Tensor:
        tensors = (
            x,
            dwconv_weight,
            dwconv_bias,
            norm_weight,
            norm_bias,
            pwconv1_weight,
            pwconv1_bias,
            pwconv2_weight,
            pwconv2_bias,
            gamma,
            grn_gamma,
            grn_beta,
        )
        if not (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in tensors)
        ):
            keep = KEEP_NOTHING
        return forward_op(*tensors, drop_scale, eps, dilation, compute_dtype(x), keep)[
            0
        ]

    return block


def _as_parameter(grad: Tensor, param: Tensor) -> Tensor:
    """In dtype, shape and strides of ``param``: compiled code relies on what
    the operator's fake announces. (Convolutions of small maps give others.)"""
    grad = grad.to(param.dtype).view_as(param)
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


def refuse_double_backward(ctx, *_):
    raise RuntimeError(
        'only the plain ConvNeXt block can be differentiated twice, not the '
        "fused ones ('lean', 'lean+', 'triton'); use impl='eager' for that"
    )


def _block_flops(
    x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, pwconv1_weight, *_, **__
) -> int:
    """Of convolution and matrix products, as PyTorch counts them."""
    n, c, h, w = x
    kernel = dwconv_weight[2] * dwconv_weight[3]
    return 2 * n * h * w * c * (kernel + 2 * pwconv1_weight[0])


def _block_backward_flops(grad_out, x, maps, hidden, *params, **_) -> int:
    """Twice the forward's, and ``lean+``'s recomputed matrix product."""
    flops = 2 * _block_flops(grad_out, *params)
    if hidden[0] == 0:
        n, c, h, w = grad_out
        flops += 2 * n * h * w * c * params[4][0]
    return flops


def define_downsample(
    name: str, norm: Callable, norm_backward: Callable
) -> Callable[..., Tensor]:
    """LayerNorm and convolution as the custom operators
    ``convnext_mm::{name}_downsample`` and ``_downsample_backward``. They keep
    their input only, which the norm of an emitted map keeps too, and recompute
    LayerNorm.

    Args:
        norm: ``(x, weight, bias, eps, dtype)`` to the normalised (..., C)
            map, and whatever statistics ``norm_backward`` wants.
        norm_backward: ``(grad, x, weight, bias, eps, needs, *statistics)`` to
            three gradients, None where not needed.

    Returns:
        A function with the signature of
        :func:`convnext_mm.ops.eager.downsample`.
    """

    @torch.library.custom_op(f'convnext_mm::{name}_downsample', mutates_args=())
    def forward_op(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        eps: float,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: torch.dtype,
    ) -> Tensor:
        with _undisturbed_on(x):
            normed = norm(x.permute(0, 2, 3, 1), norm_weight, norm_bias, eps, dtype)[0]
            out = F.conv2d(
                normed.permute(0, 3, 1, 2),
                conv_weight.to(dtype),
                conv_bias.to(dtype),
                stride,
                padding,
                dilation,
            )
            return out.contiguous(memory_format=torch.channels_last)

    @forward_op.register_fake
    def _(
        x,
        norm_weight,
        norm_bias,
        conv_weight,
        conv_bias,
        eps,
        stride,
        padding,
        dilation,
        dtype,
    ):
        sizes = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(
                x.shape[2:], padding, dilation, conv_weight.shape[2:], stride
            )
        ]
        out = x.new_empty(len(x), len(conv_weight), *sizes, dtype=dtype)
        return out.contiguous(memory_format=torch.channels_last)

    @torch.library.custom_op(
        f'convnext_mm::{name}_downsample_backward', mutates_args=()
    )
    def backward_op(
        grad: Tensor,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        conv_weight: Tensor,
        eps: float,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: torch.dtype,
        needs: list[bool],
    ) -> list[Tensor]:
        with _undisturbed_on(x):
            x = x.permute(0, 2, 3, 1)
            normed, *statistics = norm(x, norm_weight, norm_bias, eps, dtype)
            d_normed, d_weight, d_bias = torch.ops.aten.convolution_backward(
                grad,
                normed.permute(0, 3, 1, 2),
                conv_weight.to(dtype),
                [len(conv_weight)],
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                1,
                [any(needs[:3]), needs[3], needs[4]],
            )
            grads = [None, None, None, d_weight, d_bias]
            if any(needs[:3]):
                grads[:3] = norm_backward(
                    d_normed.permute(0, 2, 3, 1),
                    x,
                    norm_weight,
                    norm_bias,
                    eps,
                    needs[:3],
                    *statistics,
                )
            if needs[0]:
                grads[0] = grads[0].permute(0, 3, 1, 2)
            params = (
                None,
                norm_weight,
                norm_bias,
                conv_weight,
                conv_weight.new_empty(len(conv_weight)),
            )
            return [
                x.new_empty(0)
                if not need
                else grad.to(x.dtype)
                if param is None
                else _as_parameter(grad, param)
                for grad, param, need in zip(grads, params, needs)
            ]

    @backward_op.register_fake
    def _(
        grad,
        x,
        norm_weight,
        norm_bias,
        conv_weight,
        eps,
        stride,
        padding,
        dilation,
        dtype,
        needs,
    ):
        grads = (
            torch.empty_like(x, memory_format=torch.channels_last),
            torch.empty_like(norm_weight),
            torch.empty_like(norm_bias),
            torch.empty_like(conv_weight),
            conv_weight.new_empty(len(conv_weight)),
        )
        return [g if need else x.new_empty(0) for g, need in zip(grads, needs)]

    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[5:]

    def run_backward(ctx, grad):
        needs = list(ctx.needs_input_grad[:5])
        grads = backward_op(grad, *ctx.saved_tensors, *ctx.settings, needs)
        return tuple(g if need else None for g, need in zip(grads, needs)) + (None,) * 5

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    backward_op.register_autograd(refuse_double_backward)
    operators = torch.ops.convnext_mm
    register_flop_formula(getattr(operators, f'{name}_downsample'))(_downsample_flops)
    register_flop_formula(getattr(operators, f'{name}_downsample_backward'))(
        _downsample_backward_flops
    )

    def downsample(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        *,
        eps: float = 1e-6,
        stride: Sequence[int] = (2, 2),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
    ) -> Tensor:
        return forward_op(
            x,
            norm_weight,
            norm_bias,
            conv_weight,
            conv_bias,
            eps,
            stride,
            padding,
            dilation,
            compute_dtype(x),
        )

    return downsample


def _downsample_flops(
    x, norm_weight, norm_bias, conv_weight, *_, out_shape, **__
) -> int:
    n, _, h, w = out_shape
    return 2 * n * h * w * math.prod(conv_weight)


def _downsample_backward_flops(
    grad, x, norm_weight, norm_bias, conv_weight, *_, **__
) -> int:
    n, _, h, w = grad
    return 4 * n * h * w * math.prod(conv_weight)
