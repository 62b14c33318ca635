"""The ConvNeXt block in plain PyTorch: the definition of correct."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import BlockWeights


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation (ConvNeXt V2, arXiv 2301.00808, eqs. 1-3).

    The norm over the map is summed in fp32 at least: a 16-bit sum of squares
    over a detection-sized map overflows (fp16) or loses its small terms (bf16).

    Args:
        x: (N, H, W, C), any floating dtype.
        gamma, beta: (1, 1, 1, C).
        eps: Added to the mean norm over channels.

    Returns:
        (N, H, W, C); fp32 where ``x`` is 16-bit and ``gamma`` is fp32.
    """
    norm = torch.linalg.vector_norm(
        x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )  # (N, 1, 1, C)
    response = (norm / (norm.mean(dim=-1, keepdim=True) + eps)).to(
        torch.promote_types(x.dtype, gamma.dtype)
    )
    return gamma * (x * response) + beta + x


def block(
    x: Tensor,
    weights: BlockWeights,
    drop_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    dilation: int = 1,
) -> Tensor:
    """One ConvNeXt block (arXiv 2201.03545, section 2.6 and figure 4).

    ``x + drop_scale * gamma * W2 grn(gelu(W1 layer_norm(dwconv(x)))))``

    The pointwise convolutions are linear layers over the last dimension of
    (N, H, W, C). With a channels-last ``x`` no step copies a layout: both
    permutes are views.

    Args:
        x: (N, C, H, W).
        weights: Of the block.
        drop_scale: (N,), 0 for a dropped sample, 1 / keep probability for a
            kept one. None: nothing is dropped.
        eps: LayerNorm's.
        dilation: Of the depthwise convolution.

    Returns:
        (N, C, H, W).
    """
    w = weights
    channels, _, kernel_size, _ = w.dwconv_weight.shape
    padding = dilation * (kernel_size // 2)
    y = F.conv2d(
        x,
        w.dwconv_weight,
        w.dwconv_bias,
        padding=(padding, padding),  # PyTorch 2.4 traces no single number
        dilation=dilation,
        groups=channels,
    )
    y = y.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
    y = F.layer_norm(y, (channels,), w.norm_weight, w.norm_bias, eps)
    y = F.gelu(F.linear(y, w.pwconv1_weight, w.pwconv1_bias))
    if w.grn_gamma is not None:
        assert w.grn_beta is not None
        y = grn(y, w.grn_gamma, w.grn_beta)
    y = F.linear(y, w.pwconv2_weight, w.pwconv2_bias)
    if w.gamma is not None:
        y = w.gamma * y
    if drop_scale is not None:
        y = y * drop_scale.to(y.dtype).view(-1, 1, 1, 1)
    return x + y.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)


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
    """The layer between two stages: LayerNorm, then a convolution.

    Args:
        x: (N, C, H, W).
        norm_weight, norm_bias: (C,).
        conv_weight: (D, C, K, K), K = 2.
        conv_bias: (D,).
        eps: LayerNorm's.
        stride, padding, dilation: The convolution's.

    Returns:
        (N, D, H', W'); H / 2 and W / 2, rounded down, at the defaults.
    """
    x = x.permute(0, 2, 3, 1)  # a view of a channels-last map
    # The weight's shape, not that of x: exporters then know it.
    x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    return F.conv2d(
        x.permute(0, 3, 1, 2), conv_weight, conv_bias, stride, padding, dilation
    )


def norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, channels_last: bool
) -> Tensor:
    """LayerNorm over the channels of (N, C, H, W).

    Args:
        weight, bias: (C,).
        channels_last: Strides of the output; else contiguous.
    """
    x = x.permute(0, 2, 3, 1)  # a view of a channels-last map
    x = F.layer_norm(x, weight.shape, weight, bias, eps)
    x = x.permute(0, 3, 1, 2)
    return x if channels_last else x.contiguous()
