"""Facts of the published architectures."""

from typing import Any, NamedTuple

NUM_STAGES = 4


class Arch(NamedTuple):
    """Facts of a published architecture."""

    depths: tuple[int, ...]
    channels: tuple[int, ...]
    norm_eps: float = 1e-6


# tiny to xlarge: arXiv 2201.03545, section 3. atto to nano, huge: arXiv
# 2301.00808, appendix A. xxlarge: OpenCLIP's ConvNeXt-XXLarge.
ARCHS: dict[str, Arch] = {
    'atto': Arch((2, 2, 6, 2), (40, 80, 160, 320)),
    'femto': Arch((2, 2, 6, 2), (48, 96, 192, 384)),
    'pico': Arch((2, 2, 6, 2), (64, 128, 256, 512)),
    'nano': Arch((2, 2, 8, 2), (80, 160, 320, 640)),
    'tiny': Arch((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': Arch((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': Arch((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': Arch((3, 3, 27, 3), (192, 384, 768, 1536)),
    'xlarge': Arch((3, 3, 27, 3), (256, 512, 1024, 2048)),
    'xxlarge': Arch((3, 4, 30, 3), (384, 768, 1536, 3072), norm_eps=1e-5),
    'huge': Arch((3, 3, 27, 3), (352, 704, 1408, 2816)),
}


class IsotropicArch(NamedTuple):
    """Facts of a published isotropic architecture: blocks of one width, at one
    resolution."""

    depth: int
    channels: int
    layer_scale: bool


# arXiv 2201.03545, section 3.3 and table 2, and its released definition.
ISOTROPIC_ARCHS: dict[str, IsotropicArch] = {
    'small': IsotropicArch(18, 384, layer_scale=False),
    'base': IsotropicArch(18, 768, layer_scale=False),
    'large': IsotropicArch(36, 1024, layer_scale=True),
}


class Decisions(NamedTuple):
    """What a network on the paper's road from ResNet to ConvNeXt has decided
    (arXiv 2201.03545, section 2)."""

    depths: tuple[int, ...]  # blocks of each stage
    width: int  # channels of the stem; each stage has twice those before it
    stem: str = 'resnet'
    depthwise: bool = False
    bottleneck: str = 'narrow'
    depthwise_position: str = 'middle'
    kernel_size: int = 3
    activation: str = 'ReLU'
    num_activations: int = 3
    num_norms: int = 3
    norm: str = 'BN'
    separate_downsampling: bool = False


# What each decision but depths, width and kernel size may be.
CHOICES: dict[str, tuple] = dict(
    stem=('resnet', 'patchify'),
    depthwise=(False, True),
    bottleneck=('narrow', 'inverted'),
    depthwise_position=('middle', 'first'),
    activation=('ReLU', 'GELU'),
    num_activations=(3, 1),
    num_norms=(3, 1),
    norm=('BN', 'LN'),
    separate_downsampling=(False, True),
)
# Where each regime starts, what "stage ratio" makes of it, and its last width.
# "increase width" comes to ResNet-200 in two parts, the first with "stage ratio".
REGIMES: dict[str, tuple[Decisions, dict[str, Any], int]] = {
    'resnet50': (Decisions((3, 4, 6, 3), 64), dict(depths=(3, 3, 9, 3)), 96),
    'resnet200': (
        Decisions((3, 24, 36, 3), 64),
        dict(depths=(3, 3, 27, 3), width=84),
        128,
    ),
}


def _roadmap(regime: str) -> dict[str, Decisions]:
    start, ratio, width = REGIMES[regime]
    # Every step keeps what those before it decided; kernel sizes 9 and 11 were
    # tried and given up.
    changes: dict[str, dict[str, Any]] = {
        'resnet': {},
        'enhanced recipe': {},  # the same network, trained as ConvNeXt is
        'stage ratio': ratio,
        'patchify stem': dict(stem='patchify'),
        'depthwise conv': dict(depthwise=True),
        'increase width': dict(width=width),
        'inverting dimensions': dict(bottleneck='inverted'),
        'move up depthwise conv': dict(depthwise_position='first'),
        'kernel size 5': dict(kernel_size=5),
        'kernel size 7': dict(kernel_size=7),
        'kernel size 9': dict(kernel_size=9),
        'kernel size 11': dict(kernel_size=11),
        'ReLU to GELU': dict(kernel_size=7, activation='GELU'),
        'fewer activations': dict(num_activations=1),
        'fewer norms': dict(num_norms=1),
        'BN to LN': dict(norm='LN'),
        'separate downsampling': dict(separate_downsampling=True),
    }
    steps, decisions = {}, start
    for name, change in changes.items():
        decisions = decisions._replace(**change)
        steps[name] = decisions
    return steps


# Regime to step to network, in the paper's order (tables 10 and 11). Each reproduces
# the printed FLOPs but two, see docs/roadmap.md.
ROADMAP: dict[str, dict[str, Decisions]] = {r: _roadmap(r) for r in REGIMES}
STEPS = tuple(ROADMAP['resnet50'])
