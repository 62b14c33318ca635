"""What is exported: modules from an image to results, in operators that every
target knows."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_mm.models import StagedBackbone


class AdaptiveAvgPool2d(nn.Module):
    """PyTorch's, as two matrix products: ONNX has no operator whose windows differ in
    size, which they do where a map cannot be divided evenly."""

    def __init__(self, output_size: int | Sequence[int | None]) -> None:
        super().__init__()
        sizes = (output_size,) * 2 if isinstance(output_size, int) else output_size
        self.height, self.width = sizes

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, height, width)."""
        if self.height is not None:
            x = _windows(x.shape[2], self.height, x) @ x
        if self.width is not None:
            x = x @ _windows(x.shape[3], self.width, x).T
        return x


def _windows(size: int, count: int, like: Tensor) -> Tensor:
    """(count, size): row i averages [floor(i size / count), ceil((i + 1) size /
    count))."""
    column = torch.arange(size, device=like.device)[None]
    row = torch.arange(count, device=like.device)[:, None]
    start = (row * size).div(count, rounding_mode='floor')
    end = ((row + 1) * size + count - 1).div(count, rounding_mode='floor')
    inside = (start <= column) & (column < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


class Network(nn.Module):
    """Something to export.

    Attributes:
        inputs: Names of what :meth:`forward` takes, all of them images.
        outputs: Names of what it returns.
        batch: Whether it takes several images at once.
        min_size: The smallest height and width.
    """

    outputs: tuple[str, ...]
    channels: int
    batch = True
    min_size = 32

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype


class BackboneNetwork(Network):
    """A backbone alone: normalised images (N, C, H, W) fp32 to its maps in fp32."""

    def __init__(self, backbone: StagedBackbone, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.backbone = backbone
        self.outputs = tuple(f'stage{i + 1}' for i in backbone.out_indices)
        self.min_size = backbone.min_size
        self.channels = backbone.in_channels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in self.backbone(images.to(self.dtype)))


class WholeNetwork(Network):
    """A model with its preprocessing: images (N, 3, H, W), fp32, red first, 0 to
    255."""

    channels = 3
    mean: Tensor
    std: Tensor
    divisor: int
    pad_value: float

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.model = model
        preprocessor = model.data_preprocessor
        neutral = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        is_normalising = getattr(preprocessor, '_enable_normalize', False)
        mean, std = (preprocessor.mean, preprocessor.std) if is_normalising else neutral
        # Without conversion a model wants blue first, as OpenCV reads pictures.
        self.flip = not preprocessor._channel_conversion
        self.register_buffer('mean', mean.float().clone(), persistent=False)
        self.register_buffer('std', std.float().clone(), persistent=False)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised, padded below and on the right, and in ``dtype``."""
        height, width = images.shape[2:]
        x = images.flip(1) if self.flip else images
        x = (x - self.mean) / self.std
        padding = (0, -width % self.divisor, 0, -height % self.divisor)
        return F.pad(x, padding, value=self.pad_value).to(self.dtype)


class SegmentorNetwork(WholeNetwork):
    """A segmentor of MMSegmentation on whole images: images to logits (N, classes,
    H, W) in fp32 and their best class (N, H, W) in int64."""

    outputs = 'logits', 'classes'

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        preprocessor = model.data_preprocessor
        # MMSegmentation pads tests only where a config says so.
        self.divisor = (preprocessor.test_cfg or {}).get('size_divisor') or 1
        self.pad_value = float(preprocessor.pad_val)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[2:]
        x = self.prepare(images)
        head = self.model.decode_head
        logits = F.interpolate(
            head(self.model.extract_feat(x)).float(),
            x.shape[2:],
            mode='bilinear',
            align_corners=head.align_corners,
        )[:, :, :height, :width]
        if head.out_channels == 1:
            classes = (logits.sigmoid() > head.threshold)[:, 0].long()
        else:
            classes = logits.argmax(1)
        return logits, classes
