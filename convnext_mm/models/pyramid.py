"""A pyramid of maps for backbones that have one."""

from collections.abc import Sequence

from mmengine.model import BaseModule
from torch import Tensor, nn

from convnext_mm.registry import MODELS, register

from .arguments import integer
from .block import LayerNorm2d


@register(MODELS)
class SimplePyramid(BaseModule):
    """Makes a map of stride 16 into maps of strides 4, 8, 16 and 32, by transposed
    convolutions and a max pooling (the simple feature pyramid of arXiv 2203.16527,
    without its last projections, which the FPN or head behind it has).

    MMSegmentation's ``Feature2Pyramid`` takes four maps, and MMDetection has none.

    Args:
        in_channels: C of the map, or a sequence with that one number.
        init_cfg: MMEngine's.

    Attributes:
        out_channels (tuple[int]): C / 4, C / 2, C, C.

    Raises:
        TypeError, ValueError: ``in_channels`` is no multiple of 4.
    """

    def __init__(
        self, in_channels: int | Sequence[int], init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if isinstance(in_channels, Sequence) and len(in_channels) == 1:
            in_channels = in_channels[0]
        if not isinstance(in_channels, int) or in_channels < 4 or in_channels % 4:
            raise ValueError(
                'in_channels must be the channels of one map, a multiple of 4, got '
                f'{in_channels!r}'
            )
        c = integer('in_channels', in_channels, 4)
        self.out_channels = self.channels_of(c)
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(c, c // 2, 2, 2),
            LayerNorm2d(c // 2),
            nn.GELU(),
            nn.ConvTranspose2d(c // 2, c // 4, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(c, c // 2, 2, 2)
        self.down2 = nn.MaxPool2d(2, 2)

    @staticmethod
    def channels_of(in_channels: int) -> tuple[int, ...]:
        """Of the four maps."""
        return in_channels // 4, in_channels // 2, in_channels, in_channels

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One (N, C, H, W) to (N, C / 4, 4 H, 4 W), (N, C / 2, 2 H, 2 W),
        (N, C, H, W) and (N, C, H / 2, W / 2).

        Raises:
            ValueError: There are several maps, or it is of one row or column.
        """
        if isinstance(maps, Tensor) or len(maps) != 1:
            raise ValueError(f'SimplePyramid takes a list of one map, got {len(maps)}')
        if min(maps[0].shape[2:]) < 2:
            raise ValueError(
                f'SimplePyramid halves a map of at least 2 x 2, got '
                f'{tuple(maps[0].shape[2:])}: take larger images'
            )
        (x,) = maps
        return tuple(
            y.contiguous() for y in (self.up4(x), self.up2(x), x, self.down2(x))
        )
