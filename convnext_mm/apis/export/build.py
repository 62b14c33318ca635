"""The network to export of a model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone
from convnext_mm.models.block import Block

from .networks import AdaptiveAvgPool2d, BackboneNetwork, Network, SegmentorNetwork

# What exporters are shown instead of a module of PyTorch.
REPLACED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.AdaptiveAvgPool2d: lambda pool: AdaptiveAvgPool2d(pool.output_size)
}


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
    """
    Raises:
        ConfigError: Its head does more than logits, or it pads images to one size.
    """
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = model.decode_head
    size = (model.data_preprocessor.test_cfg or {}).get('size')
    if size:
        raise ConfigError(
            f'test_cfg=dict(size={size}) of the data_preprocessor pads every image to '
            'one size: set size_divisor instead to export the model'
        )
    if isinstance(head, nn.ModuleList) or (
        type(head).predict is not BaseDecodeHead.predict
        or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat
    ):
        name = type(head[-1] if isinstance(head, nn.ModuleList) else head).__name__
        raise ConfigError(
            f'a segmentor with {name} cannot be exported whole, only one whose single '
            'head gives logits (UPerHead, FCNHead, ...): take --part backbone'
        )
