"""This package's own layout: how parameters of a ConvNeXt are named, and which
shapes a network gives them. It is that of the paper's release."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from convnext_mm.archs import ARCHS, ISOTROPIC_ARCHS, NUM_STAGES

Shape = tuple[int, ...]
# Where every parameter lies but norms: stage s is stages.{s}, and before it
# come downsample_layers.{s}, whose first one is the stem.
PARTS = ('stages', 'downsample_layers')
# A classifier's last normalisation: of the pooled features, or of the map that
# it pools then.
FINAL_NORM = 'final_norm'
MAP_NORM = f'{FINAL_NORM}_of_map'
AFFINE = ('weight', 'bias')


def downsample_names(stage: int) -> tuple[str, str]:
    """Convolution and norm before a stage; the norm comes second in the stem
    only."""
    conv, norm = (1, 0) if stage else (0, 1)
    return f'downsample_layers.{stage}.{conv}', f'downsample_layers.{stage}.{norm}'


STEM = f'{downsample_names(0)[0]}.weight'
CONVS = {f'{downsample_names(s)[0]}.weight' for s in range(NUM_STAGES)}


def is_conv(name: str) -> bool:
    """Whether a parameter is a convolution's weight."""
    return name in CONVS or name.endswith('dwconv.weight')


class Spec(NamedTuple):
    """What the shapes of a state dict say about its network."""

    depths: Shape
    channels: Shape
    in_channels: int
    stem_patch_size: int
    kernel_size: int
    hidden: Shape  # channels between the pointwise layers
    use_grn: bool
    layer_scale: bool
    isotropic: bool = False  # one stage, no norm after its patches

    @property
    def arch(self) -> str:
        """The published names that fit, or depths and channels."""
        if self.isotropic:
            fitting = [
                name
                for name, arch in ISOTROPIC_ARCHS.items()
                if ((arch.depth,), (arch.channels,)) == (self.depths, self.channels)
            ]
            (depth,), (channels,) = self.depths, self.channels
            return ''.join(fitting) or f'dict(depth={depth}, channels={channels})'
        n = len(self.depths)
        names = [
            name
            for name, arch in ARCHS.items()
            if (arch.depths[:n], arch.channels[:n]) == (self.depths, self.channels)
        ]
        return ' or '.join(names) or (
            f'dict(depths={list(self.depths)}, channels={list(self.channels)})'
        )

    def __str__(self) -> str:
        stages = (
            ''
            if len(self.depths) == NUM_STAGES or self.isotropic
            else f', first {len(self.depths)} stages'
        )
        kind = 'isotropic' if self.isotropic else 'V2' if self.use_grn else 'V1'
        return f'ConvNeXt {kind} {self.arch}{stages}'


def infer_spec(state: Mapping[str, Tensor]) -> Spec:
    """The network that a state dict belongs to. Where parameters contradict each
    other the majority counts; stages end before the first that has nothing."""
    stages = []
    for s in range(NUM_STAGES):
        stage = _infer_stage(state, s)
        if stage is None:
            break
        stages.append(stage)
    stem = state.get(STEM)
    kernels = [
        t.shape[2] for name, t in state.items() if name.endswith('dwconv.weight')
    ]
    return Spec(
        depths=tuple(depth for depth, _, _ in stages),
        channels=tuple(width for _, width, _ in stages),
        in_channels=stem.shape[1] if stem is not None else 3,
        stem_patch_size=stem.shape[2] if stem is not None else 4,
        kernel_size=_most_common(kernels, 7),
        hidden=tuple(hidden for _, _, hidden in stages),
        use_grn=any('.grn.' in name for name in state),
        layer_scale=any(
            name.endswith('.gamma') and '.grn.' not in name for name in state
        ),
        isotropic=len(stages) == 1
        and not any(f'{downsample_names(0)[1]}.{leaf}' in state for leaf in AFFINE),
    )


def _infer_stage(state: Mapping[str, Tensor], s: int) -> tuple[int, int, int] | None:
    """Blocks, channels and hidden channels of a stage; None: it is not there."""
    start, conv = f'stages.{s}.', downsample_names(s)[0]
    block = {
        name[len(start) :]: tensor
        for name, tensor in state.items()
        if name.startswith(start)
    }
    layer = [state[name] for leaf in AFFINE if (name := f'{conv}.{leaf}') in state]
    if not block and not layer:
        return None
    depth = max((int(name.split('.')[0]) + 1 for name in block), default=0)
    widths = [
        tensor.shape[0]
        for name, tensor in block.items()
        if name.split('.', 1)[1]
        in ('norm.weight', 'norm.bias', 'dwconv.bias', 'pwconv2.bias')
    ] + [tensor.shape[0] for tensor in layer]
    width = _most_common(widths, 0)
    hidden = [t.shape[0] for name, t in block.items() if name.endswith('.pwconv1.bias')]
    return depth, width, _most_common(hidden, 4 * width)


def _most_common(values: Iterable[int], default: int) -> int:
    counts = Counter(values).most_common(1)
    return counts[0][0] if counts else default


def expected_shapes(spec: Spec) -> dict[str, Shape]:
    """Shapes of stem, downsampling layers and stages of a network."""
    shapes: dict[str, Shape] = {}
    before = spec.in_channels
    for s, (depth, width, hidden) in enumerate(
        zip(spec.depths, spec.channels, spec.hidden)
    ):
        size = 2 if s else spec.stem_patch_size
        conv, norm = downsample_names(s)
        layers: dict[str, Shape] = {conv: (width, before, size, size)}
        if not spec.isotropic:
            layers[norm] = (before if s else width,)
        for b in range(depth):
            block = f'stages.{s}.{b}'
            layers[f'{block}.dwconv'] = (width, 1, spec.kernel_size, spec.kernel_size)
            layers[f'{block}.norm'] = (width,)
            layers[f'{block}.pwconv1'] = (hidden, width)
            layers[f'{block}.pwconv2'] = (width, hidden)
            if spec.use_grn:
                shapes[f'{block}.grn.gamma'] = (1, 1, 1, hidden)
                shapes[f'{block}.grn.beta'] = (1, 1, 1, hidden)
            elif spec.layer_scale:
                shapes[f'{block}.gamma'] = (width,)
        for name, shape in layers.items():
            shapes[f'{name}.weight'] = shape
            shapes[f'{name}.bias'] = shape[:1]
        before = width
    return shapes
