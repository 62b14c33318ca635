"""The ConvNeXt block for inference with frozen weights.

Folding removes two multiplications for each value, exactly up to rounding:
``W1 (w n + b) + b1 = (W1 diag(w)) n + (W1 b + b1)`` for LayerNorm's affine
``w, b``, and ``gamma (W2 h + b2) = (diag(gamma) W2) h + gamma b2`` for layer
scale. Of GRN (V2) beta folds into ``b2``; gamma does not, its factor depends
on the map. Packing then casts the weights once and, on a CPU, gives them the
order that oneDNN reads.
"""

import torch
from torch import Tensor

from convnext_mm.private_names import has, onednn_multiplies

from . import fused, lean
from .weights import BlockWeights


def fold(weights: BlockWeights) -> BlockWeights:
    """The same block with more in its pointwise layers: LayerNorm's weight and
    layer scale become 1, LayerNorm's bias and GRN's beta 0. Products are in fp64,
    results in the dtypes that came in.
    """
    w1, w2 = weights.pwconv1_weight.double(), weights.pwconv2_weight.double()
    b1 = weights.pwconv1_bias + w1 @ weights.norm_bias.double()
    b2 = weights.pwconv2_bias.double()
    gamma, beta = weights.gamma, weights.grn_beta
    if beta is not None:
        b2 = b2 + w2 @ beta.double().flatten()
        beta = torch.zeros_like(beta)
    w1 = w1 * weights.norm_weight
    if gamma is not None:
        w2, b2 = w2 * gamma[:, None], b2 * gamma
        gamma = torch.ones_like(gamma)
    return weights._replace(
        norm_weight=torch.ones_like(weights.norm_weight),
        norm_bias=torch.zeros_like(weights.norm_bias),
        pwconv1_weight=w1.to(weights.pwconv1_weight.dtype),
        pwconv1_bias=b1.to(weights.pwconv1_bias.dtype),
        pwconv2_weight=w2.to(weights.pwconv2_weight.dtype),
        pwconv2_bias=b2.to(weights.pwconv2_bias.dtype),
        gamma=gamma,
        grn_beta=beta,
    )


def pack(weights: BlockWeights, dtype: torch.dtype) -> lean.Packed:
    """Folds weights, casts them to ``dtype`` and reorders those of matrix
    products for oneDNN."""
    folded = fold(weights)
    w1, w2 = folded.pwconv1_weight.to(dtype), folded.pwconv2_weight.to(dtype)
    if (
        onednn_multiplies(dtype)
        and lean.onednn(w1)
        and has('torch.ops.mkldnn._reorder_linear_weight')
    ):
        w1, w2 = (
            torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), lean.CHUNK_ROWS)
            for w in (w1, w2)
        )
    return lean.Packed(
        dwconv_weight=folded.dwconv_weight.to(dtype),
        dwconv_bias=folded.dwconv_bias.to(dtype),
        norm=None,
        w1=w1,
        b1=folded.pwconv1_bias.to(dtype),
        w2=w2,
        b2=folded.pwconv2_bias.to(dtype),
        grn_gamma=folded.grn_gamma,
    )


class DeployedBlock:
    """:func:`convnext_mm.ops.eager.block` without gradients, for weights that
    seldom change: packed in the first call, and again once they are others.

    Its copies and pickles hold nothing: reordered weights allow neither.
    """

    def __init__(self) -> None:
        self._packed: dict[torch.dtype, tuple[object, lean.Packed]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return DeployedBlock, ()

    def __call__(
        self,
        x: Tensor,
        weights: BlockWeights,
        drop_scale: Tensor | None = None,
        *,
        eps: float = 1e-6,
        dilation: int = 1,
    ) -> Tensor:
        dtype = fused.compute_dtype(x)
        packed = self._pack(weights, dtype)
        scale = fused.residual_scale(None, drop_scale)
        out_dtype = fused.out_dtype(x, weights.gamma, dtype)
        with torch.autocast(x.device.type, enabled=False):
            return lean.run(x, packed, scale, out_dtype, eps, dilation)[0]

    def _pack(self, weights: BlockWeights, dtype: torch.dtype) -> lean.Packed:
        # Loading or moving weights must not leave an old copy in use.
        source = tuple(
            (w.device, w.data_ptr(), 0 if w.is_inference() else w._version)
            for w in weights
            if w is not None
        )
        if dtype not in self._packed or self._packed[dtype][0] != source:
            self._packed[dtype] = source, pack(weights, dtype)
        return self._packed[dtype][1]
