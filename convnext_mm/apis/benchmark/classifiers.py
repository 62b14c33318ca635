"""Classifiers that the paper's tables have side by side."""

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_mm.analysis.meter import Step
from convnext_mm.models import ConvNeXt

from .models import rename
from .networks import (
    DEPLOY,
    LAYER_SCALE,
    OTHERS,
    PEER_MODULES,
    Networks,
    Paper,
    build_checked,
    one_line,
)

NUM_CLASSES = 1000
SWIN_WINDOWS = {224: 7, 384: 12}  # by side of the image, arXiv 2103.14030


class Classifier(nn.Module):
    """A backbone, global average pooling of a map that is not pooled yet, and one
    linear layer: (N, 3, H, W) to (N, 1000)."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)[-1]
        if features.ndim == 4:
            features = features.mean((2, 3))
        return self.head(features)


def build_classifiers(
    names: Sequence[str], arch: str, device: str, side: int
) -> Networks:
    """ConvNeXts with the same weights, seen to give the same, and other networks
    with weights of their own; channels-last, as their libraries leave them
    otherwise.

    Args:
        names: Of ours, ``'paper'``, ``'mmpretrain'``, ``'resnet50'``, ``'swin'``.
        side: Of the images, which decides on Swin's windows.

    Raises:
        SystemExit: One of ours gives something else than plain PyTorch.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        arch=arch,
        out_indices=3,
        gap_before_final_norm=True,
        layer_scale_init_value=LAYER_SCALE,
    )
    model = Classifier(backbone := ConvNeXt(**settings, impl='eager'), width(backbone))

    def build_one(name: str) -> nn.Module:
        if name != 'mmpretrain':
            return _same(name, model, ConvNeXt, settings)
        library = importlib.import_module(PEER_MODULES[name])
        network = library.ConvNeXt(
            dict(depths=backbone.depths, channels=backbone.channels),
            out_indices=[3],
            gap_before_final_norm=True,
        )
        peer = Classifier(network, width(backbone))
        peer.load_state_dict(rename(model.state_dict()))
        return peer

    convnexts = [name for name in names if name not in OTHERS]
    networks = build_checked(convnexts, build_one, model, device)
    for name in names:
        if name in OTHERS:
            try:
                networks.built[name] = _other(name, arch, side).to(device)
            except Exception as reason:  # whatever a library may raise
                networks.skipped[name] = one_line(reason)
    return _channels_last(networks)


def build_isotropic(
    names: Sequence[str], arch: str, device: str, drop_path_rate: float
) -> Networks:
    """The same of the isotropic ConvNeXt: ours and ``'paper'``."""
    from convnext_mm.models.isotropic import IsotropicConvNeXt

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        arch=arch, gap_before_final_norm=True, drop_path_rate=drop_path_rate
    )
    backbone = IsotropicConvNeXt(**settings, impl='eager')
    for name, parameter in backbone.named_parameters():
        if name.endswith('.gamma'):
            nn.init.constant_(parameter, LAYER_SCALE)
    model = Classifier(backbone, width(backbone))
    return _channels_last(
        build_checked(
            names,
            lambda name: _same(name, model, IsotropicConvNeXt, settings),
            model,
            device,
        )
    )


def width(backbone: Any) -> int:
    return backbone.channels[-1]


def _same(name: str, model: Classifier, kind: Any, settings: dict) -> Classifier:
    """Another implementation of this package's classifier, or the paper's."""
    other: Any = copy.deepcopy(model)
    if name == 'paper':
        other.backbone = Paper(other.backbone)
        return other
    other.backbone = kind(**settings, impl=name.removesuffix(DEPLOY))
    other.load_state_dict(model.state_dict())
    if name.endswith(DEPLOY):
        other.backbone.switch_to_deploy()
    return other


def _other(name: str, arch: str, side: int) -> nn.Module:
    if name == 'resnet50':
        return importlib.import_module('torchvision.models').resnet50()
    swin = importlib.import_module('mmpretrain.models').SwinTransformer(
        arch,
        img_size=side,
        window_size=SWIN_WINDOWS.get(side, SWIN_WINDOWS[224]),
        pad_small_map=True,
    )
    for module in swin.modules():
        if hasattr(module, 'w_msa'):
            module.w_msa.register_forward_pre_hook(_cast_mask, with_kwargs=True)
    return Classifier(swin, swin.num_features[-1])


def _cast_mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Its mask of windows is always fp32, and 16-bit weights do not run with it."""
    if (mask := kwargs.get('mask')) is not None:
        kwargs['mask'] = mask.to(args[0].dtype)
    return args, kwargs


def _channels_last(networks: Networks) -> Networks:
    for network in networks.built.values():
        network.to(memory_format=torch.channels_last)
    return networks


def inference(network: nn.Module, x: Tensor, autocast: torch.dtype | None) -> Step:
    """A forward pass of a classifier.

    Args:
        x: (N, 3, H, W) in the dtype of the network.
        autocast: Its dtype; None: without.
    """
    network.eval()

    @torch.no_grad()
    def infer() -> None:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            network(x)

    return Step(infer)


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    autocast: torch.dtype | None,
) -> Step:
    """Cross entropy with random labels, backward and the optimizer's step."""
    network.train()
    labels = torch.randint(NUM_CLASSES, (len(x),), device=x.device)

    def train() -> None:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(network(x), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Step(train)
