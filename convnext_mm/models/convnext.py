"""ConvNeXt V1 and V2 as a multi-scale backbone."""

import functools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from convnext_mm.archs import NUM_STAGES
from convnext_mm.registry import MODELS, register

from .arguments import (
    check_mmpretrain_defaults,
    check_numbers,
    integer,
    one_of,
    parse_arch,
    parse_output_stride,
)
from .backbone import StagedBackbone
from .block import IMPL_NAMES, Block, Downsample, LayerNorm2d
from .graphs import Graphs


class PaddedConv2d(nn.Conv2d):
    """Conv2d that sees one column of zeros to the right of its input and one
    row below: a 2 x 2 kernel at stride 1 keeps the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@register(MODELS)
class ConvNeXt(StagedBackbone):
    """ConvNeXt (arXiv 2201.03545) and, with ``use_grn``, ConvNeXt V2
    (arXiv 2301.00808) as a backbone for detection and segmentation.

    A stem, then four stages of blocks with a downsampling layer before each but
    the first. Each emitted map passes its own LayerNorm over channels. Stages
    after the last emitted one are not built, so that every parameter gets a
    gradient. Names in the state dict are those of the paper's released code.

    Args:
        arch: A name in :data:`convnext_mm.archs.ARCHS`, or
            ``dict(depths=[...], channels=[...])`` with four stages (``dims`` is
            accepted for ``channels``).
        in_channels: Channels of the input image.
        stem_patch_size: Kernel and stride of the stem.
        kernel_size: Of the depthwise convolutions, odd.
        mlp_ratio: Hidden channels of the pointwise layers over the block's.
        norm_eps: eps of every LayerNorm. None: the published one of ``arch``,
            1e-6 except for xxlarge (1e-5).
        use_grn: ConvNeXt V2: global response normalisation in every block and
            no layer scale, whatever ``layer_scale_init_value`` says.
        drop_path_rate: Stochastic depth of the last block; it grows linearly
            from 0 over all blocks. In [0, 1).
        layer_scale_init_value: Initial layer scale; 0: no layer scale.
        out_indices: Stages to emit, an int or a sequence; negative ones count
            from the last stage. Maps come in stage order.
        out_norm: Whether emitted maps pass a LayerNorm of their own.
        output_stride: 8 or 16: no map is coarser than that, by dilation in
            place of downsampling, for heads of semantic segmentation; weights
            and their names stay, values are those of timm's. 32: nothing is
            dilated.
        frozen_stages: 0 or -1 freezes nothing; k freezes the stem, the first k
            stages and the downsampling layers before them.
        out_layout: Memory layout of emitted maps. ``'contiguous'``, what any
            head can take. ``'channels_last'``: as they are computed, without a
            copy; values are equal. Only for heads that heed strides: PyTorch's
            operators do, mmcv's RoIAlign reads garbage (
            ``convnext_mm.SingleRoIExtractor`` prevents that).
        gap_before_final_norm: Emit (N, C_i), pooled and then normalised, for
            classifiers. mmpretrain's default is True, and its ``out_indices`` -1:
            a classifier's config written for its ConvNeXt must set both.
        with_cp: Recompute blocks in backward: less memory, more time.
        impl: What computes the blocks; neither weights nor outputs depend on
            it. ``'eager'``: plain PyTorch. ``'lean'``: a backward of its own
            that stores about half. ``'lean+'``: one that stores least and
            recomputes a matrix product. ``'triton'``: as ``'lean'``, in fused
            GPU kernels. ``'auto'``: the best that device, dtype and shape
            allow. ``CONVNEXT_MM_IMPL`` in the environment overrides it.
        allow_partial: Load what fits of a checkpoint, with a warning. By
            default one that lacks a parameter of stem, downsampling layers or
            stages, or has it in another shape, is an error.
        norm_cfg, act_cfg, linear_pw_conv: Accepted at the defaults of
            mmpretrain's ConvNeXt only, so that a detector's or segmentor's config
            written for it works.
        cuda_graphs: Sizes of inputs whose passes are kept as CUDA graphs, which a GPU
            runs without waiting for Python; 0: none. For inference, and for
            training with crops of one size (ADE20K, classification) and few images
            a GPU. Each takes the memory of a pass for good. Multi-scale training
            has too many sizes.
        init_cfg: MMEngine's. ``dict(type='Pretrained', checkpoint=...,
            prefix=...)`` takes the checkpoint of any ConvNeXt, a file or an
            address, see :func:`convnext_mm.load_checkpoint`. Without it
            weights start from a truncated normal of std 0.02, biases from 0
            except the stem's (:class:`UnevenStemBias`), layer scale from its
            initial value.

    Attributes:
        num_stages (int): 4.
        depths, channels (tuple[int]): Blocks and channels of each stage.
        out_indices (tuple[int]): Emitted stages, ascending.
        out_channels (tuple[int]): Channels of the emitted maps.

    Raises:
        TypeError, ValueError: A setting has the wrong type or value. The
            message names the argument, the value and what is allowed.

    Examples:
        >>> import torch
        >>> from convnext_mm import ConvNeXt
        >>> model = ConvNeXt('tiny', drop_path_rate=0.4)
        >>> [tuple(y.shape) for y in model(torch.rand(1, 3, 64, 96))]
        [(1, 96, 16, 24), (1, 192, 8, 12), (1, 384, 4, 6), (1, 768, 2, 3)]
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        stem_patch_size: int = 4,
        kernel_size: int = 7,
        mlp_ratio: float = 4,
        norm_eps: float | None = None,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norm: bool = True,
        out_layout: str = 'contiguous',
        output_stride: int = 32,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = False,
        with_cp: bool = False,
        impl: str = 'auto',
        allow_partial: bool = False,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        linear_pw_conv: bool = True,
        cuda_graphs: int = 0,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        published = parse_arch(arch)
        stride = integer('stem_patch_size', stem_patch_size, 1)
        super().__init__(
            published.depths,
            published.channels,
            stride,
            in_channels,
            out_indices,
            out_layout,
            integer('frozen_stages', frozen_stages, -1, NUM_STAGES),
            gap_before_final_norm,
            allow_partial,
            init_cfg,
        )
        self.stem_patch_size = stem_patch_size
        self.output_stride = parse_output_stride(output_stride, self.stem_patch_size)
        self.norm_eps = published.norm_eps if norm_eps is None else norm_eps
        self.impl = one_of('impl', impl, IMPL_NAMES)
        check_numbers(
            kernel_size,
            mlp_ratio,
            min(self.channels),
            self.norm_eps,
            layer_scale_init_value,
        )
        check_mmpretrain_defaults(
            norm_cfg=norm_cfg, act_cfg=act_cfg, linear_pw_conv=linear_pw_conv
        )
        self._new_block = functools.partial(
            Block,
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            norm_eps=self.norm_eps,
            use_grn=use_grn,
            layer_scale_init_value=layer_scale_init_value,
            with_cp=with_cp,
            impl=impl,
        )
        self._build(drop_path_rate, out_norm)
        if integer('cuda_graphs', cuda_graphs, 0):
            self.graphs = Graphs(cuda_graphs)

    def _block(self, stage: int, index: int, drop_path: float) -> Block:
        dilation = self._dilation(stage)
        return self._new_block(
            self.channels[stage], drop_path=drop_path, dilation=dilation
        )

    def _out_norm(self, channels: int) -> LayerNorm2d:
        return LayerNorm2d(
            channels,
            eps=self.norm_eps,
            impl=self.impl,
            channels_last=self.out_layout == 'channels_last',
        )

    def _downsample_layer(self, stage: int) -> nn.Module:
        width = self.channels[stage]
        if stage == 0:
            patch = self.stem_patch_size
            conv = nn.Conv2d(self.in_channels, width, patch, patch)
            norm = LayerNorm2d(width, eps=self.norm_eps, impl=self.impl)
            return nn.Sequential(conv, norm)
        before = self.channels[stage - 1]
        conv = _downsample_conv(before, width, self._dilation(stage))
        return Downsample(LayerNorm2d(before, eps=self.norm_eps), conv, impl=self.impl)

    def _dilation(self, stage: int) -> int:
        """What a stage must dilate by to see as far as without
        ``output_stride``."""
        if self.output_stride == 32:
            return 1
        return max(1, self.stem_patch_size * 2**stage // self.output_stride)


def _downsample_conv(in_channels: int, out_channels: int, dilation: int) -> nn.Conv2d:
    """The 2 x 2 convolution before a stage of dilation 1, 2 or more: halves the
    map, or keeps its size. As timm has it, it is itself dilated where an
    earlier stage was already."""
    if dilation == 1:
        return nn.Conv2d(in_channels, out_channels, 2, stride=2)
    if dilation == 2:
        return PaddedConv2d(in_channels, out_channels, 2)
    return nn.Conv2d(in_channels, out_channels, 2, padding=1, dilation=2)
