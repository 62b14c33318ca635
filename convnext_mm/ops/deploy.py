"""The ConvNeXt block for inference with frozen weights.

Folding removes two multiplications for each value, exactly up to rounding:
``W1 (w n + b) + b1 = (W1 diag(w)) n + (W1 b + b1)`` for LayerNorm's affine
``w, b``, and ``gamma (W2 h + b2) = (diag(gamma) W2) h + gamma b2`` for layer
scale. Of GRN (V2) beta folds into ``b2``; gamma does not, its factor depends
on the map. Packing then casts the weights once and, on a CPU, gives them the
order that oneDNN reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import fused, lean


class Packed(NamedTuple):
    """Weights in the compute dtype, ready to run on one device."""

    dwconv_weight: Tensor
    dwconv_bias: Tensor
    pwconv1_weight: Tensor
    pwconv1_bias: Tensor
    pwconv2_weight: Tensor
    pwconv2_bias: Tensor
    grn_gamma: Tensor | None


def fold(
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor,
    gamma: Tensor | None,
    grn_beta: Tensor | None,
) -> tuple[Tensor, ...]:
    """Both pointwise layers' weights and biases with the factors around them
    folded in; shapes as in :func:`convnext_mm.ops.eager.block`. Products are
    in fp64, results in the dtype that came in.
    """
    w1, w2 = pwconv1_weight.double(), pwconv2_weight.double()
    b1 = pwconv1_bias + w1 @ norm_bias.double()
    b2 = pwconv2_bias.double()
    if grn_beta is not None:
        b2 = b2 + w2 @ grn_beta.double().flatten()
    w1 = w1 * norm_weight
    if gamma is not None:
        w2, b2 = w2 * gamma[:, None], b2 * gamma
    return tuple(
        new.to(old.dtype)
        for new, old in zip(
            (w1, b1, w2, b2),
            (pwconv1_weight, pwconv1_bias, pwconv2_weight, pwconv2_bias),
        )
    )


def pack(
    dwconv_weight: Tensor,
    dwconv_bias: Tensor,
    folded: tuple[Tensor, ...],
    grn_gamma: Tensor | None,
    dtype: torch.dtype,
) -> Packed:
    """Casts weights to ``dtype`` and reorders those of matrix products."""
    w1, b1, w2, b2 = (t.to(dtype) for t in folded)
    if (
        dtype in (torch.float32, torch.bfloat16)
        and lean.onednn(w1)
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
    ):
        w1, w2 = (
            torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), lean.CHUNK_ROWS)
            for w in (w1, w2)
        )
    return Packed(
        dwconv_weight.to(dtype), dwconv_bias.to(dtype), w1, b1, w2, b2, grn_gamma
    )


def block(
    x: Tensor, packed: Packed, out_dtype: torch.dtype, *, eps: float, dilation: int
) -> Tensor:
    """:func:`convnext_mm.ops.eager.block` in evaluation mode, of packed
    weights; no gradient.

    Args:
        x: (N, C, H, W).
        packed: From :func:`pack`, in the dtype to compute in.
        out_dtype: Of the output.

    Returns:
        (N, C, H, W).
    """
    with torch.autocast(x.device.type, enabled=False):
        maps = lean.depthwise(
            x.to(packed.dwconv_bias.dtype),
            packed.dwconv_weight,
            packed.dwconv_bias,
            dilation,
        )
        out = torch.empty_like(x, dtype=out_dtype, memory_format=fused.memory_format(x))
        lean.pointwise(
            fused.rows(x),
            fused.rows(maps),
            fused.rows(out),
            None,
            None,
            *packed[2:6],
            None,
            packed.grn_gamma,
            None,
            eps,
            False,
        )
        return out
