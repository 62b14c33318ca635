"""Exported files give what the model gives, in a process without this package."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import toys
from cli_runs import run_command
from mmengine.registry import MODELS
from repo import ROOT
from torch import nn

import convnext_mm
from convnext_mm.apis.export.networks import AdaptiveAvgPool2d, network_for
from convnext_mm.apis.export.targets import TARGETS
from convnext_mm.datasets.shapes import draw_scene
from convnext_mm.engine.errors import ConfigError

pytest.importorskip('onnxruntime')
slow = pytest.mark.slow
V1 = dict(type='convnext_mm.ConvNeXt', arch=toys.ARCH, layer_scale_init_value=1.0)
V2 = dict(type='convnext_mm.ConvNeXt', arch=toys.ARCH, use_grn=True)


def build(cfg, scale=1.0):
    """A network of random weights, each of which shows."""
    model = toys.randomise(MODELS.build(cfg))
    with torch.no_grad():
        for param in model.parameters():
            param *= scale
    return model


@slow
@pytest.mark.parametrize('to', TARGETS)
@pytest.mark.parametrize('backbone', [V1, V2], ids=['v1', 'v2'])
def test_backbone(tmp_path, backbone, to):
    result = convnext_mm.export(build(backbone), to, tmp_path / f'b{TARGETS[to]}')
    assert 0 < result.differences['largest'] < 1e-5
    assert result.outputs == ('stage1', 'stage2', 'stage3', 'stage4')
    assert result.bytes == result.path.stat().st_size < 1e6
    assert result.time > 0
    # Folded: layer scale, and LayerNorm's bias, are multiplied by nobody.
    assert sum(result.operators.values()) < 250


@slow
@pytest.mark.parametrize('to', ['onnx', 'torchscript'])
def test_fp16(tmp_path, to):
    result = convnext_mm.export(
        build(V2), to, tmp_path / f'b{TARGETS[to]}', dtype='fp16'
    )
    assert 1e-6 < result.differences['largest'] < 1e-2
