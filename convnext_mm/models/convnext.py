"""ConvNeXt V1 and V2 as a multi-scale backbone."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule, update_init_info
from torch import Tensor, nn

from convnext_mm.archs import NUM_STAGES
from convnext_mm.checkpoint.layout import downsample_names
from convnext_mm.checkpoint.load import AnyFamily
from convnext_mm.registry import MODELS, register

from .arguments import (
    check_mmpretrain_defaults,
    check_numbers,
    integer,
    one_of,
    parse_arch,
    parse_out_indices,
    parse_output_stride,
)
from .block import IMPL_NAMES, Block, Downsample, LayerNorm2d
from .layer_id import default_num_layers, get_layer_id

# mmcv's RoIAlign and its like read memory as (N, C, H, W) whatever the strides
# say: to them channels-last would be garbage, so it is not the default.
OUT_LAYOUTS = dict(
    contiguous=torch.contiguous_format, channels_last=torch.channels_last
)
STEM, _ = downsample_names(0)


class PaddedConv2d(nn.Conv2d):
    """Conv2d that sees one column of zeros to the right of its input and one
    row below: a 2 x 2 kernel at stride 1 keeps the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


@register(MODELS)
class ConvNeXt(AnyFamily, BaseModule):
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
            classifiers.
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
            mmpretrain's ConvNeXt only, so that a config written for it works.
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

    init_cfg: dict | Sequence[dict] | None

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
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        published = parse_arch(arch)
        self.num_stages = NUM_STAGES
        self.depths, self.channels = published.depths, published.channels
        self.out_indices = parse_out_indices(out_indices)
        self.out_channels = tuple(self.channels[i] for i in self.out_indices)
        self.in_channels = integer('in_channels', in_channels, 1)
        self.stem_patch_size = integer('stem_patch_size', stem_patch_size, 1)
        self.frozen_stages = integer('frozen_stages', frozen_stages, -1, NUM_STAGES)
        self.output_stride = parse_output_stride(output_stride, self.stem_patch_size)
        self.out_layout = one_of('out_layout', out_layout, OUT_LAYOUTS)
        self.gap_before_final_norm = gap_before_final_norm
        self.allow_partial = allow_partial
        self.deployed = False
        norm_eps = published.norm_eps if norm_eps is None else norm_eps
        one_of('impl', impl, IMPL_NAMES)
        check_numbers(
            kernel_size,
            mlp_ratio,
            min(self.channels),
            norm_eps,
            drop_path_rate,
            layer_scale_init_value,
        )
        check_mmpretrain_defaults(
            norm_cfg=norm_cfg, act_cfg=act_cfg, linear_pw_conv=linear_pw_conv
        )

        norm = functools.partial(LayerNorm2d, eps=norm_eps)
        block = functools.partial(
            Block,
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            norm_eps=norm_eps,
            use_grn=use_grn,
            layer_scale_init_value=layer_scale_init_value,
            with_cp=with_cp,
            impl=impl,
        )
        drop_paths = iter(
            torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()
        )
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            width, dilation = self.channels[i], self._dilation(i)
            blocks = [
                block(width, drop_path=next(drop_paths), dilation=dilation)
                for _ in range(self.depths[i])
            ]
            self.downsample_layers.append(self._downsample_layer(i, norm, impl))
            self.stages.append(nn.Sequential(*blocks))
            if out_norm and i in self.out_indices:
                is_last = out_layout == 'channels_last'
                out = norm(width, impl=impl, channels_last=is_last)
                self.add_module(f'norm{i}', out)
        _init_weights(self)
        self._freeze()

    def init_weights(self) -> None:
        """Initialises by ``init_cfg``; MMEngine calls it before training.

        An initialiser that leaves the stem's bias the same in all channels, as
        nearly all do, gets it redrawn: images padded with zeros need that, see
        :class:`UnevenStemBias`. What ``Pretrained`` loads stays as it is.
        """
        given = self.init_cfg
        if given:
            cfgs = [given] if isinstance(given, dict) else given
            # MMEngine runs Pretrained after all others.
            self.init_cfg = [*cfgs, dict(type=UnevenStemBias)]
        try:
            super().init_weights()
        finally:
            self.init_cfg = given

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Multi-scale features of a batch of images.

        Args:
            x: (N, in_channels, H, W), floating, H and W at least 8 times
                ``stem_patch_size`` (32).

        Returns:
            One (N, C_i, H / s_i, W / s_i) for each emitted stage, strides s_i
            of 4, 8, 16, 32 (sizes rounded down) for ``stem_patch_size=4``, none
            above ``output_stride``, in memory of ``out_layout``; or (N, C_i)
            with ``gap_before_final_norm``.

        Raises:
            TypeError, ValueError: ``x`` has another type, rank, number of
                channels, or is too small.
        """
        self._check_input(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample_layers[i](x))
            if i in self.out_indices:
                out = x
                if self.gap_before_final_norm:
                    out = out.mean((2, 3), keepdim=True)
                norm = getattr(self, f'norm{i}', None)
                out = out if norm is None else norm(out)
                outs.append(
                    out.flatten(1)
                    if self.gap_before_final_norm
                    else out.contiguous(memory_format=OUT_LAYOUTS[self.out_layout])
                )
        return tuple(outs)

    def switch_to_deploy(self) -> 'ConvNeXt':
        """Freezes the weights for inference and makes it faster.

        LayerNorm's affine and layer scale of every block (GRN's beta in V2)
        are folded into the pointwise layers, see
        :mod:`convnext_mm.ops.deploy`; outputs stay but for rounding. State-dict
        keys stay too: what was folded is 1 or 0. Under ``torch.no_grad()``
        weights are then cast once, not for every call. Twice is as once; call
        it again after writing to a parameter's ``.data``, which PyTorch does
        not notice.

        Returns:
            The module, in evaluation mode, with no parameter to train.
        """
        self.eval()
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Block):
                module.switch_to_deploy()
        self.deployed = True
        return self

    def train(self, mode: bool = True) -> 'ConvNeXt':
        """Sets the mode; frozen stages stay in evaluation mode.

        Raises:
            RuntimeError: Training mode after :meth:`switch_to_deploy`.
        """
        if mode and self.deployed:
            raise RuntimeError(
                'after switch_to_deploy() a ConvNeXt is for inference only; '
                'build it again and load its checkpoint to train it'
            )
        super().train(mode)
        self._freeze()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Layer id of a parameter and the number of ids, as mmpretrain's
        layer-wise learning-rate decay asks for them.

        Args:
            param_name: Parameter name in the whole model.
            prefix: What precedes the backbone's own names, ``'backbone.'``.

        Returns:
            ``(layer_id, num_ids)``; the learning-rate scale is
            ``decay_rate ** (num_ids - layer_id - 1)``.
        """
        num_layers = default_num_layers(self.depths)
        return (get_layer_id(param_name, num_layers, prefix=prefix), num_layers + 2)

    def _downsample_layer(
        self, stage: int, norm: Callable[..., LayerNorm2d], impl: str
    ) -> nn.Module:
        """The stem, or what halves the map before a later stage."""
        width = self.channels[stage]
        if stage == 0:
            patch = self.stem_patch_size
            conv = nn.Conv2d(self.in_channels, width, patch, patch)
            return nn.Sequential(conv, norm(width, impl=impl))
        before = self.channels[stage - 1]
        conv = _downsample_conv(before, width, self._dilation(stage))
        return Downsample(norm(before), conv, impl=impl)

    def _dilation(self, stage: int) -> int:
        """What a stage must dilate by to see as far as without
        ``output_stride``."""
        if self.output_stride == 32:
            return 1
        return max(1, self.stem_patch_size * 2**stage // self.output_stride)

    def _freeze(self) -> None:
        for i in range(min(self.frozen_stages, len(self.stages))):
            for module in (self.downsample_layers[i], self.stages[i]):
                module.eval()
                module.requires_grad_(False)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                'the backbone takes a tensor (N, '
                f'{self.in_channels}, H, W), got '
                f'{type(x).__name__}'
            )
        if not x.is_floating_point():
            raise TypeError(
                'the backbone takes a floating-point image, got '
                f'{x.dtype}: convert and normalise it first (the '
                'data_preprocessor of a detector or segmentor does)'
            )
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'the backbone takes (N, {self.in_channels}, H, W), got '
                f'{tuple(x.shape)}; for images with other channels set '
                'in_channels'
            )
        min_size = self.stem_patch_size * 2 ** (NUM_STAGES - 1)
        if min(x.shape[2:]) < min_size:
            raise ValueError(
                f'the input must be at least {min_size} x {min_size} pixels, '
                f'got {x.shape[2]} x {x.shape[3]}: pad or resize it'
            )


def _downsample_conv(in_channels: int, out_channels: int, dilation: int) -> nn.Conv2d:
    """The 2 x 2 convolution before a stage of dilation 1, 2 or more: halves the
    map, or keeps its size. As timm has it, it is itself dilated where an
    earlier stage was already."""
    if dilation == 1:
        return nn.Conv2d(in_channels, out_channels, 2, stride=2)
    if dilation == 2:
        return PaddedConv2d(in_channels, out_channels, 2)
    return nn.Conv2d(in_channels, out_channels, 2, padding=1, dilation=2)


def _init_weights(backbone: ConvNeXt) -> None:
    """Truncated normal of std 0.02, zero biases (arXiv 2201.03545, table 5), but
    for the stem's, which stays PyTorch's own: see :class:`UnevenStemBias`."""
    for name, module in backbone.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None and name != STEM:
                nn.init.zeros_(module.bias)


class UnevenStemBias:
    """Initialiser that redraws the stem's bias of a :class:`ConvNeXt` where all
    channels share one value.

    The paper's code, timm and mmpretrain start it from 0; they train from
    scratch without padding. Detectors and segmentors pad normalised images with
    zeros. There the stem's output is its bias; where that is 0, so is every
    later map, as far as the depthwise kernels do not reach into the image: all
    biases are 0. LayerNorm divides gradients by sqrt(variance + eps), 1e-3
    where its input is constant over channels. So each downsampling layer, each
    block (times the gains of its own layers) and the stem's norm make the
    gradient in padding up to 1000 times as large, and the sum of it, the
    gradient of the stem's bias, is 1e5 times that of an image without padding
    or more, until fp32 overflows. With an uneven bias no LayerNorm sees a
    constant, and padding adds nothing.
    """

    def __call__(self, backbone: ConvNeXt) -> None:
        bias = backbone.get_parameter(f'{STEM}.bias')
        if (bias == bias[0]).all():
            # As PyTorch draws that of a new convolution.
            bound = backbone.get_parameter(f'{STEM}.weight')[0].numel() ** -0.5
            nn.init.uniform_(bias, -bound, bound)
            update_init_info(backbone, f'{type(self).__name__}: bound={bound:.3g}')
