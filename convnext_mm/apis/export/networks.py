"""What is exported: modules from an image to results, in operators that every
target knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone
from convnext_mm.models.block import Block

# What exporters are shown instead of a module of PyTorch.
REPLACED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.AdaptiveAvgPool2d: lambda pool: AdaptiveAvgPool2d(pool.output_size)
}


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


class _Whole(Network):
    """A model with its preprocessing: images (N, 3, H, W), fp32, red first, 0 to
    255."""

    channels = 3
    mean: Tensor
    std: Tensor

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

    def normalise(self, images: Tensor) -> Tensor:
        x = images.flip(1) if self.flip else images
        return (x - self.mean) / self.std


class SegmentorNetwork(_Whole):
    """A segmentor of MMSegmentation on whole images: images to logits (N, classes,
    H, W) in fp32 and their best class (N, H, W) in int64."""

    outputs = 'logits', 'classes'

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.extract_feat(self.normalise(images).to(self.dtype))
        head = self.model.decode_head
        logits = F.interpolate(
            head(features).float(),
            images.shape[2:],
            mode='bilinear',
            align_corners=head.align_corners,
        )
        if head.out_channels == 1:
            classes = (logits.sigmoid() > head.threshold)[:, 0].long()
        else:
            classes = logits.argmax(1)
        return logits, classes


def prepare(model: nn.Module, dtype: torch.dtype) -> None:
    """Folds, casts and replaces, in place, what exporting needs so.

    Args:
        model: In evaluation mode.
        dtype: Of its weights.
    """
    for module in model.modules():
        if isinstance(module, StagedBackbone):
            module.switch_to_deploy()
            for block in module.modules():
                if isinstance(block, Block):
                    block.gamma = None  # 1, since it was folded
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            make = REPLACED.get(type(child))
            if make is not None:
                setattr(parent, name, make(child))
    model.requires_grad_(False)
    preprocessor = getattr(model, 'data_preprocessor', None)
    model.to(dtype)
    if preprocessor is not None:
        preprocessor.float()  # images are normalised in fp32


def network_for(model: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
    """What is exported of a model.

    Args:
        model: A backbone of this package, a segmentor of MMSegmentation or a
            detector of MMDetection, in evaluation mode. It is changed: see
            :func:`prepare`.
        dtype: Of weights and of the arithmetic of backbone, neck and heads;
            normalisation, boxes and results stay in fp32.

    Raises:
        ConfigError: The model is in training mode, or has a part that cannot be
            exported.
    """
    if model.training:
        raise ConfigError(
            'the model is in training mode: call model.eval() before it is exported'
        )
    if isinstance(model, StagedBackbone):
        if model.gap_before_final_norm:
            raise ConfigError(
                'gap_before_final_norm=True gives vectors, not maps: build the '
                'backbone without it to export it'
            )
        network: Network = BackboneNetwork(model, dtype)
    elif hasattr(model, 'decode_head'):
        _check_segmentor(model)
        network = SegmentorNetwork(model, dtype)
    elif hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
        # MMDetection may be missing, or broken.
        from .detectors import detector_network

        network = detector_network(model, dtype)
    else:
        raise ConfigError(
            f'{type(model).__name__} is no backbone of this package, no segmentor and '
            'no detector: --part backbone exports the backbone of any model'
        )
    prepare(model, dtype)
    return network.eval()


def _check_segmentor(model: Any) -> None:
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = model.decode_head
    if isinstance(head, nn.ModuleList) or (
        type(head).predict is not BaseDecodeHead.predict
        or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat
    ):
        name = type(head[-1] if isinstance(head, nn.ModuleList) else head).__name__
        raise ConfigError(
            f'a segmentor with {name} cannot be exported whole, only one whose single '
            'head gives logits (UPerHead, FCNHead, ...): take --part backbone'
        )
