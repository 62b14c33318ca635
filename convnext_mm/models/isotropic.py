"""The isotropic ConvNeXt: one resolution, one width."""

import functools
from collections.abc import Sequence

from torch import nn

from convnext_mm.archs import ISOTROPIC_ARCHS, IsotropicArch
from convnext_mm.registry import MODELS, register

from .arguments import check_numbers, integer, one_of
from .backbone import StagedBackbone
from .block import IMPL_NAMES, Block, LayerNorm2d

NORM_EPS = 1e-6


@register(MODELS)
class IsotropicConvNeXt(StagedBackbone):
    """Isotropic ConvNeXt (arXiv 2201.03545, section 3.3): the shape of a vision
    transformer, with ConvNeXt's blocks. One convolution makes patches, then all
    blocks see the same resolution; its one map has the stride of the patches.

    For heads that want a pyramid put :class:`convnext_mm.SimplePyramid` between.
    In the state dict the patches are ``downsample_layers.0.0`` and the blocks
    ``stages.0.N``; checkpoints with the released names (``stem``, ``blocks.N``)
    load like any other.

    Args:
        arch: ``'small'``, ``'base'`` or ``'large'``, or
            ``dict(depth=..., channels=...)``.
        in_channels: Channels of the input image.
        patch_size: Kernel and stride of the first convolution.
        kernel_size: Of the depthwise convolutions, odd.
        mlp_ratio: Hidden channels of the pointwise layers over the block's.
        drop_path_rate: Stochastic depth of the last block; it grows linearly
            from 0 over all blocks. In [0, 1). Published: 0.1, 0.2, 0.5.
        layer_scale_init_value: Initial layer scale; 0: none. None: as published,
            1e-6 for large, none for the others.
        out_norm: Whether the map passes a LayerNorm.
        frozen_stages: Blocks that are frozen, with the patches before them, as
            MMPretrain counts for networks of this shape; 0 or -1: nothing.
        out_layout, gap_before_final_norm, with_cp, impl, allow_partial, init_cfg:
            As for :class:`convnext_mm.ConvNeXt`.

    Attributes:
        depths, channels, out_channels (tuple[int]): Of its only stage.

    Raises:
        TypeError, ValueError: A setting has the wrong type or value.

    Examples:
        >>> import torch
        >>> from convnext_mm import IsotropicConvNeXt
        >>> model = IsotropicConvNeXt('small')
        >>> [tuple(y.shape) for y in model(torch.rand(1, 3, 64, 96))]
        [(1, 384, 4, 6)]
    """

    def __init__(
        self,
        arch: str | dict = 'small',
        in_channels: int = 3,
        patch_size: int = 16,
        kernel_size: int = 7,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = None,
        out_norm: bool = True,
        out_layout: str = 'contiguous',
        frozen_stages: int = 0,
        gap_before_final_norm: bool = False,
        with_cp: bool = False,
        impl: str = 'auto',
        allow_partial: bool = False,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        published = _parse_arch(arch)
        patch_size = integer('patch_size', patch_size, 1)
        super().__init__(
            (published.depth,),
            (published.channels,),
            patch_size,
            in_channels,
            0,
            out_layout,
            integer('frozen_stages', frozen_stages, -1, published.depth),
            gap_before_final_norm,
            allow_partial,
            init_cfg,
        )
        self.patch_size = patch_size
        self.impl = one_of('impl', impl, IMPL_NAMES)
        if layer_scale_init_value is None:
            layer_scale_init_value = 1e-6 if published.layer_scale else 0.0
        check_numbers(
            kernel_size, mlp_ratio, published.channels, NORM_EPS, layer_scale_init_value
        )
        self._new_block = functools.partial(
            Block,
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            norm_eps=NORM_EPS,
            layer_scale_init_value=layer_scale_init_value,
            with_cp=with_cp,
            impl=impl,
        )
        self._build(drop_path_rate, out_norm)

    def _block(self, stage: int, index: int, drop_path: float) -> Block:
        return self._new_block(self.channels[stage], drop_path=drop_path)

    def _downsample_layer(self, stage: int) -> nn.Module:
        patch, width = self.patch_size, self.channels[stage]
        return nn.Sequential(nn.Conv2d(self.in_channels, width, patch, patch))

    def _out_norm(self, channels: int) -> LayerNorm2d:
        is_last = self.out_layout == 'channels_last'
        return LayerNorm2d(channels, NORM_EPS, self.impl, channels_last=is_last)

    def _frozen(self) -> list[nn.Module]:
        count = max(self.frozen_stages, 0)
        patches = [self.downsample_layers[0]] if count else []
        return [*patches, *list(self.stages[0].children())[:count]]

    def default_num_layers(self) -> int:
        """One for each block."""
        return self.depths[0]

    def get_layer_id(
        self, name: str, num_layers: int, decay_type: str, prefix: str
    ) -> int:
        """Layer id of a parameter for learning-rate decay by depth: 0 for the
        patches, then the blocks spread evenly over 1 to ``num_layers``;
        ``num_layers + 1``, the full learning rate, for all else. Stage-wise the one
        stage is 1."""
        part, *numbers = name[len(prefix) :].split('.')[:3]
        if name.startswith(prefix) and part == 'downsample_layers':
            return 0
        if not name.startswith(prefix) or part != 'stages':
            return num_layers + 1
        if decay_type == 'stage_wise':
            return 1
        return 1 + int(numbers[1]) * num_layers // self.depths[0]


def _parse_arch(arch: str | dict) -> IsotropicArch:
    if isinstance(arch, str):
        if arch not in ISOTROPIC_ARCHS:
            raise ValueError(
                f'unknown arch {arch!r}; one of {tuple(ISOTROPIC_ARCHS)}, or '
                'dict(depth=..., channels=...)'
            )
        return ISOTROPIC_ARCHS[arch]
    if not isinstance(arch, dict):
        raise TypeError(
            f'arch must be a name or dict(depth=..., channels=...), got {arch!r}'
        )
    if set(arch) != {'depth', 'channels'}:
        raise ValueError(
            f'an arch dict has the keys depth and channels, got {tuple(arch)}'
        )
    depth, channels = (
        integer(f'arch[{k!r}]', arch[k], 1) for k in ('depth', 'channels')
    )
    return IsotropicArch(depth, channels, layer_scale=False)
