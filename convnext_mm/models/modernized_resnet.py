"""The networks between ResNet and ConvNeXt, each one decision further."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_mm.archs import CHOICES, ROADMAP, Decisions
from convnext_mm.checkpoint.fit_step import fit_step
from convnext_mm.checkpoint.load import Fitted
from convnext_mm.checkpoint.roadmap import ACTIVATIONS, activation_code
from convnext_mm.registry import MODELS, register

from .arguments import check_numbers, flag, integer, number, one_of
from .backbone import StagedBackbone
from .block import IMPL_NAMES, Block, Downsample, LayerNorm2d, sample_drop_scale

EPS = 1e-6  # of every LayerNorm
MAX_WIDTH = 2**16
EXPANSION = 4  # of the wide side of a bottleneck over the other
CONVNEXT_BLOCK = Decisions(
    depths=(),
    width=0,
    stem='patchify',
    depthwise=True,
    bottleneck='inverted',
    depthwise_position='first',
    kernel_size=0,
    activation='GELU',
    num_activations=1,
    num_norms=1,
    norm='LN',
    separate_downsampling=True,
)


@register(MODELS)
class ModernizedResNet(StagedBackbone):
    """Any of the seventeen networks on the road from ResNet-50 to ConvNeXt-T, or
    from ResNet-200 to ConvNeXt-B (arXiv 2201.03545, section 2, tables 10 and 11).

    A step keeps what those before it decided. Decisions given one by one replace
    those of the step: ``step='resnet', stem='patchify'`` is a ResNet-50 with another
    stem. The first step is torchvision's ResNet; the last has the layers, names and
    kernels of :class:`convnext_mm.ConvNeXt`. What the paper leaves open is decided
    here as follows, see docs/roadmap.md: a block's shortcut and the stem keep their
    norm at every step; a stem has an activation as long as blocks have three; a
    convolution right before BatchNorm has no bias; emitted maps have a norm of
    their own, and blocks layer scale, from "separate downsampling" on.

    Args:
        regime: ``'resnet50'`` or ``'resnet200'``.
        step: A key of :data:`convnext_mm.archs.ROADMAP`, such as
            ``'patchify stem'``; case, spaces, hyphens and underscores do not
            matter.
        depths: Blocks of the four stages.
        width: Channels of the stem; each stage has twice those before it, and a
            narrow bottleneck emits four times as many.
        stem: ``'resnet'``, a 7 x 7 convolution at stride 2 and a max pooling; or
            ``'patchify'``, a 4 x 4 convolution at stride 4.
        depthwise: Whether the k x k convolutions are depthwise.
        bottleneck: ``'narrow'``: the k x k convolution sees a quarter of the
            channels that blocks emit. ``'inverted'``: the hidden channels are four
            times those.
        depthwise_position: ``'middle'``, between the 1 x 1 convolutions, or
            ``'first'``.
        kernel_size: Of the k x k convolutions, odd.
        activation: ``'ReLU'`` or ``'GELU'``.
        num_activations: Of a block: 3, or 1 before the last convolution.
        num_norms: Of a block: 3, or 1 after the first convolution.
        norm: ``'BN'`` or ``'LN'``.
        separate_downsampling: A norm and a 2 x 2 convolution at stride 2 before
            each stage but the first, instead of a stride inside its first block.
        width_multiplier: Of ``width``, for narrow networks that a CPU can train;
            rounded.
        drop_path_rate: As for :class:`convnext_mm.ConvNeXt`.
        layer_scale_init_value: Of ConvNeXt's block; None: 1e-6 there. Blocks with
            other decisions have none.
        out_norm: Whether emitted maps pass a norm of their own; None: where
            downsampling is separate.
        norm_eval: Keep BatchNorm at its running statistics in training, as
            MMDetection does for pretrained ResNets.
        in_channels, out_indices, out_layout, frozen_stages: As for
            :class:`convnext_mm.ConvNeXt`.
        gap_before_final_norm, with_cp, impl, allow_partial: As there.
        init_cfg: As there. It takes checkpoints of the same step; at the first two
            those of torchvision's, timm's, MMDetection's and MMPretrain's ResNets, at
            the last those of any ConvNeXt.

    Attributes:
        decisions (convnext_mm.archs.Decisions): Those of this network.
        depths, channels, out_indices, out_channels: As for
            :class:`convnext_mm.ConvNeXt`.

    Raises:
        TypeError, ValueError: A setting has the wrong type or value, or decisions
            exclude each other.

    Examples:
        >>> import torch
        >>> from convnext_mm import ModernizedResNet
        >>> model = ModernizedResNet('resnet50', 'depthwise conv')
        >>> [y.shape[1] for y in model(torch.rand(1, 3, 64, 64))]
        [256, 512, 1024, 2048]
    """

    def __init__(
        self,
        regime: str = 'resnet50',
        step: str = 'separate downsampling',
        depths: Sequence[int] | None = None,
        width: int | None = None,
        stem: str | None = None,
        depthwise: bool | None = None,
        bottleneck: str | None = None,
        depthwise_position: str | None = None,
        kernel_size: int | None = None,
        activation: str | None = None,
        num_activations: int | None = None,
        num_norms: int | None = None,
        norm: str | None = None,
        separate_downsampling: bool | None = None,
        width_multiplier: float = 1.0,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        out_norm: bool | None = None,
        out_layout: str = 'contiguous',
        frozen_stages: int = 0,
        norm_eval: bool = False,
        gap_before_final_norm: bool = False,
        with_cp: bool = False,
        impl: str = 'auto',
        allow_partial: bool = False,
        init_cfg: dict | Sequence[dict] | None = None,
    ) -> None:
        decisions = decide(
            regime,
            step,
            depths=depths,
            width=width,
            stem=stem,
            depthwise=depthwise,
            bottleneck=bottleneck,
            depthwise_position=depthwise_position,
            kernel_size=kernel_size,
            activation=activation,
            num_activations=num_activations,
            num_norms=num_norms,
            norm=norm,
            separate_downsampling=separate_downsampling,
        )
        decisions = decisions._replace(width=_scaled(decisions.width, width_multiplier))
        widths = tuple(decisions.width * 2**i for i in range(len(decisions.depths)))
        expansion = EXPANSION if decisions.bottleneck == 'narrow' else 1
        super().__init__(
            decisions.depths,
            tuple(expansion * w for w in widths),
            4,
            in_channels,
            out_indices,
            out_layout,
            integer('frozen_stages', frozen_stages, -1, len(widths)),
            gap_before_final_norm,
            allow_partial,
            init_cfg,
        )
        self.decisions, self.widths = decisions, widths
        self.norm_eval = flag('norm_eval', norm_eval)
        self.with_cp, self.impl = (
            flag('with_cp', with_cp),
            one_of('impl', impl, IMPL_NAMES),
        )
        # ConvNeXt's block, with its kernels and names, if that is what was decided.
        self.is_convnext = (
            decisions._replace(depths=(), width=0, kernel_size=0) == CONVNEXT_BLOCK
        )
        self.layer_scale_init_value = self._layer_scale(layer_scale_init_value)
        if not self.is_convnext:
            # Weights do not show these two: states of one step would fit another.
            self.register_buffer(ACTIVATIONS, activation_code(decisions))
        if out_norm is None:
            out_norm = decisions.separate_downsampling
        self._build(drop_path_rate, flag('out_norm', out_norm))

    def train(self, mode: bool = True) -> 'ModernizedResNet':
        super().train(mode)
        if self.norm_eval:
            for norm in _batch_norms(self):
                norm.eval()
        return self

    def fit_checkpoint(self, tensors: Mapping[str, Any], prefix: str | None) -> Fitted:
        if self.is_convnext:
            return super().fit_checkpoint(tensors, prefix)
        return fit_step(self, self.decisions, tensors, prefix)

    def _layer_scale(self, value: float | None) -> float:
        if self.is_convnext:
            value = 1e-6 if value is None else value
            check_numbers(self.decisions.kernel_size, 4, min(self.widths), EPS, value)
            return value
        if value:
            raise ValueError(
                f'layer_scale_init_value={value!r}: layer scale belongs to the block '
                "of step='separate downsampling', these decisions have none: leave "
                'it out'
            )
        return 0.0

    def _norm(self, channels: int) -> nn.Module:
        if self.decisions.norm == 'BN':
            return nn.BatchNorm2d(channels)
        return LayerNorm2d(channels, eps=EPS, impl=self.impl)

    def _out_norm(self, channels: int) -> nn.Module:
        norm = self._norm(channels)
        if isinstance(norm, LayerNorm2d):
            norm.channels_last = self.out_layout == 'channels_last'
        return norm

    def _downsample_layer(self, stage: int) -> nn.Module:
        d, before = self.decisions, self.channels[stage - 1]
        if stage == 0:
            layers: list[nn.Module] = [
                nn.Conv2d(self.in_channels, d.width, 7, 2, 3, bias=d.norm != 'BN')
                if d.stem == 'resnet'
                else nn.Conv2d(self.in_channels, d.width, 4, 4, bias=d.norm != 'BN'),
                self._norm(d.width),
            ]
            if d.num_activations == 3:
                layers.append(_activation(d))
            if d.stem == 'resnet':
                layers.append(nn.MaxPool2d(3, 2, 1))
            return nn.Sequential(*layers)
        if not d.separate_downsampling:
            return nn.Identity()  # its first block halves the map
        # As wide as what the stage emits: its first block needs no shortcut.
        conv = nn.Conv2d(before, self.channels[stage], 2, 2)
        norm = self._norm(before)
        if isinstance(norm, LayerNorm2d):
            return Downsample(norm, conv, impl=self.impl)
        return nn.Sequential(norm, conv)

    def _block(self, stage: int, index: int, drop_path: float) -> nn.Module:
        d, out = self.decisions, self.channels[stage]
        if self.is_convnext:
            return Block(
                out,
                kernel_size=d.kernel_size,
                norm_eps=EPS,
                drop_path=drop_path,
                layer_scale_init_value=self.layer_scale_init_value,
                with_cp=self.with_cp,
                impl=self.impl,
            )
        entering = out
        if index == 0 and stage == 0:
            entering = d.width
        elif index == 0 and not d.separate_downsampling:
            entering = self.channels[stage - 1]
        hidden = self.widths[stage] * (1 if d.bottleneck == 'narrow' else EXPANSION)
        stride = 2 if index == 0 and stage and not d.separate_downsampling else 1
        return RoadmapBlock(
            entering, hidden, out, stride, d, self._norm, drop_path, self.with_cp
        )


class RoadmapBlock(nn.Module):
    """A residual block of any decisions: two 1 x 1 convolutions and one of k x k.

    Args:
        entering, hidden, out: Channels of the input, inside, and of the output.
        stride: Of the k x k convolution and the shortcut.
        decisions: Of the network.
        norm: Channels to norm layer.
        drop_path: Probability that a sample skips the block in training.
        with_cp: Recompute the block in backward instead of storing it.
    """

    def __init__(
        self,
        entering: int,
        hidden: int,
        out: int,
        stride: int,
        decisions: Decisions,
        norm: Any,
        drop_path: float,
        with_cp: bool,
    ) -> None:
        super().__init__()
        d = decisions
        if d.depthwise_position == 'first':
            channels, spatial = (entering, entering, hidden, out), 1
        else:
            channels, spatial = (entering, hidden, hidden, out), 2
        layers: list[tuple[nn.Module, nn.Module, nn.Module]] = []
        for i in range(3):
            before, after = channels[i : i + 2]
            is_spatial = i + 1 == spatial
            is_normed = i == 0 or d.num_norms == 3
            is_active = i == 1 or d.num_activations == 3
            size = d.kernel_size if is_spatial else 1
            conv = nn.Conv2d(
                before,
                after,
                size,
                stride if is_spatial else 1,
                size // 2,
                groups=after if is_spatial and d.depthwise else 1,
                bias=not (is_normed and d.norm == 'BN'),
            )
            layers.append(
                (
                    conv,
                    norm(after) if is_normed else nn.Identity(),
                    _activation(d) if is_active else nn.Identity(),
                )
            )
        (
            (self.conv1, self.norm1, self.act1),
            (self.conv2, self.norm2, self.act2),
            # The third activation comes after the sum with the shortcut.
            (self.conv3, self.norm3, self.act3),
        ) = layers
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or entering != out:
            conv = nn.Conv2d(entering, out, 1, stride, bias=d.norm != 'BN')
            self.shortcut = nn.Sequential(conv, norm(out))
        self.drop_path = drop_path
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(N, entering, H, W) to (N, out, H / stride, W / stride), rounded up."""
        drop_scale = sample_drop_scale(x, self.drop_path if self.training else 0)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._run,
                x,
                drop_scale,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (contextlib.nullcontext(), self._recomputing()),
            )
        return self._run(x, drop_scale)

    def _run(self, x: Tensor, drop_scale: Tensor | None) -> Tensor:
        y = self.act1(self.norm1(self.conv1(x)))
        y = self.act2(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if drop_scale is not None:
            y = y * drop_scale.to(y.dtype).view(-1, 1, 1, 1)
        return self.act3(self.shortcut(x) + y)

    @contextlib.contextmanager
    def _recomputing(self) -> Iterator[None]:
        """The same batch must not count twice in BatchNorm's statistics."""
        norms = [norm for norm in _batch_norms(self) if norm.training]
        kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, (momentum, count) in zip(norms, kept):
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)


def _batch_norms(module: nn.Module) -> list[Any]:
    """BatchNorm of any kind, synchronised or not."""
    return [m for m in module.modules() if hasattr(m, 'num_batches_tracked')]


def _activation(decisions: Decisions) -> nn.Module:
    if decisions.activation == 'GELU':
        return nn.GELU()
    return nn.ReLU()


def decide(regime: str, step: str, **given: Any) -> Decisions:
    """The decisions of a step, with those replaced that are given (not None).

    Raises:
        TypeError, ValueError: There is no such regime or step, a decision has a
            value that it cannot have, or excludes another.
    """
    steps = ROADMAP[_named('regime', regime, ROADMAP)]
    decisions = steps[_named('step', step, steps)]
    for name, allowed in CHOICES.items():
        value = given[name]
        # True is 1, and 1.0 is, too.
        known = [(type(a), a) for a in allowed]
        if value is not None and (type(value), value) not in known:
            raise ValueError(f'{name} must be one of {allowed}, got {value!r}')
    if given['depths'] is not None:
        depths = given['depths']
        if not isinstance(depths, Sequence) or len(depths) != len(decisions.depths):
            raise ValueError(f'depths must hold 4 integers, got {depths!r}')
        given['depths'] = tuple(integer('depths', n, 1) for n in depths)
    if given['width'] is not None:
        integer('width', given['width'], 1)
    if given['kernel_size'] is not None:
        check_numbers(given['kernel_size'], 1, 1, EPS, 0)
    decisions = decisions._replace(**{k: v for k, v in given.items() if v is not None})
    if decisions.depthwise_position == 'first' and not decisions.depthwise:
        raise ValueError(
            "depthwise_position='first' moves a depthwise convolution, and "
            'depthwise=False says that there is none: set depthwise=True, or '
            "depthwise_position='middle'"
        )
    return decisions


def _scaled(width: int, multiplier: float) -> int:
    scaled = width * number('width_multiplier', multiplier)
    if not 1 <= round(scaled) <= MAX_WIDTH:
        raise ValueError(
            f'width_multiplier={multiplier!r} makes {scaled:.3g} channels of {width}: '
            f'the stem needs 1 to {MAX_WIDTH}'
        )
    return round(scaled)


def _named(what: str, value: Any, allowed: Any) -> str:
    """The name that is meant, whatever its case, spaces, hyphens and underscores
    (MMEngine takes the spaces out of what ``--cfg-options`` says)."""
    if not isinstance(value, str):
        raise TypeError(f'{what} must be one of {tuple(allowed)}, got {value!r}')
    plain = {_plain(name): name for name in allowed}
    if _plain(value) in plain:
        return plain[_plain(value)]
    close = difflib.get_close_matches(_plain(value), plain, 3)
    meant = ' or '.join(repr(plain[name]) for name in close)
    advice = f'; did you mean {meant}?' if meant else '.'
    raise ValueError(
        f'there is no {what} {value!r}{advice} There are '
        f'{", ".join(repr(name) for name in allowed)}'
    )


def _plain(name: str) -> str:
    return re.sub('[ _-]', '', name.lower())
