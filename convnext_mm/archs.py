"""Facts of the published architectures."""

from typing import NamedTuple

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
