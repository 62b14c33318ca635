"""What all backbones of this package have in common: stages, and maps from them."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, update_init_info
from torch import Tensor, nn

from convnext_mm.checkpoint.layout import downsample_names
from convnext_mm.checkpoint.load import AnyFamily

from .arguments import check_drop_path_rate, integer, one_of, parse_out_indices
from .block import Block
from .graphs import Graphs
from .layer_id import default_num_layers, get_layer_id

# mmcv's RoIAlign and its like read memory as (N, C, H, W) whatever the strides
# say: to them channels-last would be garbage, so it is not the default.
OUT_LAYOUTS = dict(
    contiguous=torch.contiguous_format, channels_last=torch.channels_last
)
STEM, _ = downsample_names(0)


class StagedBackbone(AnyFamily, BaseModule):
    """A stem, then stages of blocks with a downsampling layer before each but the
    first; each emitted map may pass a norm of its own.

    A network says what its layers are (:meth:`_downsample_layer`, :meth:`_block`,
    :meth:`_out_norm`) and calls :meth:`_build` at the end of its ``__init__``.
    Stages after the last emitted one are not built, so that every parameter gets a
    gradient.

    Args:
        depths, channels: Blocks and channels of each stage.
        stride: Of the first stage's map.
        in_channels, out_indices, out_layout, frozen_stages,
            gap_before_final_norm, allow_partial, init_cfg: See
            :class:`convnext_mm.ConvNeXt`.

    Attributes:
        num_stages (int): Those of the network, built or not.
        depths, channels (tuple[int]): Blocks and channels of each stage.
        out_indices (tuple[int]): Emitted stages, ascending.
        out_channels (tuple[int]): Channels of the emitted maps.
        min_size (int): The least height and width of an image.
    """

    init_cfg: dict | Sequence[dict] | None

    def __init__(
        self,
        depths: tuple[int, ...],
        channels: tuple[int, ...],
        stride: int,
        in_channels: int,
        out_indices: int | Sequence[int],
        out_layout: str,
        frozen_stages: int,
        gap_before_final_norm: bool,
        allow_partial: bool,
        init_cfg: dict | Sequence[dict] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.num_stages = len(depths)
        self.depths, self.channels = depths, channels
        self.min_size = stride * 2 ** (self.num_stages - 1)
        self.out_indices = parse_out_indices(out_indices, self.num_stages)
        self.out_channels = tuple(channels[i] for i in self.out_indices)
        self.in_channels = integer('in_channels', in_channels, 1)
        self.frozen_stages = frozen_stages
        self.out_layout = one_of('out_layout', out_layout, OUT_LAYOUTS)
        self.gap_before_final_norm = gap_before_final_norm
        self.allow_partial = allow_partial
        self.deployed = False
        self.graphs: Graphs | None = None

    @abstractmethod
    def _downsample_layer(self, stage: int) -> nn.Module:
        """The stem, or what halves the map before a later stage."""

    @abstractmethod
    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        """A block of a stage; ``drop_path`` is the chance that it is skipped."""

    @abstractmethod
    def _out_norm(self, channels: int) -> nn.Module:
        """The norm of an emitted map."""

    def _build(self, drop_path_rate: float, out_norm: bool) -> None:
        check_drop_path_rate(drop_path_rate)
        drop_paths = iter(
            torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu').tolist()
        )
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            blocks = [
                self._block(i, j, next(drop_paths)) for j in range(self.depths[i])
            ]
            self.downsample_layers.append(self._downsample_layer(i))
            self.stages.append(nn.Sequential(*blocks))
            if out_norm and i in self.out_indices:
                self.add_module(f'norm{i}', self._out_norm(self.channels[i]))
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
        """Features of a batch of images.

        Args:
            x: (N, in_channels, H, W), floating, H and W at least ``min_size``.

        Returns:
            One (N, C_i, H / s_i, W / s_i) for each emitted stage (sizes rounded
            down), in memory of ``out_layout``; or (N, C_i) with
            ``gap_before_final_norm``.

        Raises:
            TypeError, ValueError: ``x`` has another type, rank, number of
                channels, or is too small.
        """
        self._check_input(x)
        if self.graphs is not None:
            return self.graphs.run(self, self._maps, x)
        return self._maps(x)

    def _maps(self, x: Tensor) -> tuple[Tensor, ...]:
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

    def switch_to_deploy(self) -> 'StagedBackbone':
        """Freezes the weights for inference and makes it faster.

        LayerNorm's affine and layer scale of every ConvNeXt block (GRN's beta in
        V2) are folded into the pointwise layers, see
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
        if self.graphs is not None:  # those of the folded weights are others
            self.graphs = Graphs(self.graphs.limit)
        return self

    def train(self, mode: bool = True) -> 'StagedBackbone':
        """Sets the mode; what is frozen stays in evaluation mode.

        Raises:
            RuntimeError: Training mode after :meth:`switch_to_deploy`.
        """
        if mode and self.deployed:
            raise RuntimeError(
                f'after switch_to_deploy() a {type(self).__name__} is for inference '
                'only; build it again and load its checkpoint to train it'
            )
        super().train(mode)
        self._freeze()
        return self

    def default_num_layers(self) -> int:
        """Number of layers for learning-rate decay that suits its depth."""
        return default_num_layers(self.depths)

    def get_layer_id(
        self, name: str, num_layers: int, decay_type: str, prefix: str
    ) -> int:
        """Layer id of a parameter, see :func:`.layer_id.get_layer_id`."""
        return get_layer_id(name, num_layers, decay_type, prefix)

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
        num_layers = self.default_num_layers()
        layer_id = self.get_layer_id(param_name, num_layers, 'layer_wise', prefix)
        return layer_id, num_layers + 2

    def _frozen(self) -> list[nn.Module]:
        """What ``frozen_stages`` names."""
        built = list(zip(self.downsample_layers, self.stages))
        return [m for pair in built[: max(self.frozen_stages, 0)] for m in pair]

    def _freeze(self) -> None:
        for module in self._frozen():
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
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f'the input must be at least {self.min_size} x {self.min_size} '
                f'pixels, got {x.shape[2]} x {x.shape[3]}: pad or resize it'
            )


def _init_weights(backbone: StagedBackbone) -> None:
    """Truncated normal of std 0.02, zero biases (arXiv 2201.03545, table 5), but
    for the stem's, which stays PyTorch's own: see :class:`UnevenStemBias`."""
    for name, module in backbone.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None and name != STEM:
                nn.init.zeros_(module.bias)


class UnevenStemBias:
    """Initialiser that redraws the stem's bias of a backbone where all channels
    share one value. A stem without a bias, before BatchNorm, needs none of this.

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

    def __call__(self, backbone: StagedBackbone) -> None:
        bias = backbone.get_submodule(STEM).bias
        if isinstance(bias, Tensor) and (bias == bias[0]).all():
            # As PyTorch draws that of a new convolution.
            bound = backbone.get_parameter(f'{STEM}.weight')[0].numel() ** -0.5
            nn.init.uniform_(bias, -bound, bound)
            update_init_info(backbone, f'{type(self).__name__}: bound={bound:.3g}')
