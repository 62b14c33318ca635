"""Detectors and segmentors that the paper's tables have side by side, ready for
inference."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import nn

from convnext_mm.analysis import complexity
from convnext_mm.analysis.meter import Step
from convnext_mm.engine.optimizers.amp import keep_boxes_in_fp32

from .models import Models
from .networks import DEPLOY

LOWEST_SCORE = 0.5


class Inference(Models):
    """Models of one recipe that differ in their backbones, and random images.

    Weights are random, and how many proposals and objects a detector happens to find
    would decide what an image costs: thousands of boxes would go through NMS with one
    backbone and none with another. So the last layers of RPN and box heads give the
    same for every network, anchors as they are and one class for each box; NMS runs
    on that. Then, as where FLOPs are counted, 1000 boxes go to the box heads, and 100
    to the mask heads, and their masks to the size of the image.
    """

    training = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for name, model in self.models.items():
            if name.endswith(DEPLOY):
                model.backbone.switch_to_deploy()
            if self.task != 'segmentor':
                _fix_numbers(model, self.size, self.device)

    def step(self, name: str, autocast: torch.dtype | None = None) -> Step:
        """From the images' bytes to boxes and masks of their size, or classes."""
        data = [copy.deepcopy(self.batch)]  # a model changes what it gets
        if autocast == torch.bfloat16:
            keep_boxes_in_fp32(self.models[name])

        @torch.no_grad()
        def infer() -> None:
            with torch.autocast(self.device, autocast, enabled=autocast is not None):
                self.models[name].test_step(data.pop())

        return Step(infer, lambda: data.append(copy.deepcopy(self.batch)))


@torch.no_grad()
def _fix_numbers(model: Any, size: Sequence[int], device: str) -> None:
    """Lets heads have as many boxes as the papers count with, and NMS the same
    ones, whatever comes from the backbone."""
    rpn, heads = model.rpn_head, model.roi_head.bbox_head
    layers = [rpn.rpn_cls, rpn.rpn_reg]
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        layers += [head.fc_cls, head.fc_reg]
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer in layers[2::2]:
        # Half of the score to the first class, next to nothing to each other.
        layer.bias[0] = math.log(len(layer.bias) - 1)
    proposals = _boxes(complexity.NUM_PROPOSALS, size, device)
    detections = _boxes(complexity.NUM_DETECTIONS, size, device)
    _replace(rpn, 'predict', proposals)
    _replace(model.roi_head, 'predict_bbox', detections)


def _replace(head: nn.Module, method: str, boxes: InstanceData) -> None:
    predict = getattr(head, method)

    def run(*args: Any, **kwargs: Any) -> list[InstanceData]:
        return [boxes.clone() for _ in predict(*args, **kwargs)]

    vars(head)[method] = run


def _boxes(number: int, size: Sequence[int], device: str) -> InstanceData:
    """Random ones inside the image, a 16th to a half of it high and wide."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.rand(number, 2, generator=generator) * 7 / 16 + 1 / 16
    corners = torch.rand(number, 2, generator=generator) * (1 - sides)
    height, width = size
    scale = torch.tensor([width, height, width, height])
    return InstanceData(
        bboxes=(torch.cat([corners, corners + sides], 1) * scale).to(device),
        scores=torch.linspace(1, LOWEST_SCORE, number, device=device),
        labels=torch.zeros(number, dtype=torch.long, device=device),
    )
