"""The weights of one ConvNeXt block, by name and in order."""

from typing import NamedTuple

from torch import Tensor


class BlockWeights(NamedTuple):
    """Of a block with C channels, M hidden ones (4C) and a K x K depthwise
    convolution, K odd. V1 has no GRN, V2 no layer scale ``gamma``."""

    dwconv_weight: Tensor  # (C, 1, K, K)
    dwconv_bias: Tensor  # (C,)
    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    pwconv1_weight: Tensor  # (M, C)
    pwconv1_bias: Tensor  # (M,)
    pwconv2_weight: Tensor  # (C, M)
    pwconv2_bias: Tensor  # (C,)
    gamma: Tensor | None = None  # (C,)
    grn_gamma: Tensor | None = None  # (1, 1, 1, M)
    grn_beta: Tensor | None = None  # (1, 1, 1, M)


class BlockNeeds(NamedTuple):
    """Which gradients backward is asked for: the input's and each weight's."""

    x: bool
    dwconv_weight: bool
    dwconv_bias: bool
    norm_weight: bool
    norm_bias: bool
    pwconv1_weight: bool
    pwconv1_bias: bool
    pwconv2_weight: bool
    pwconv2_bias: bool
    gamma: bool
    grn_gamma: bool
    grn_beta: bool
