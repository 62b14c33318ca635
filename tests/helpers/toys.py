"""Small networks, and weights that show."""

import torch
from torch import nn

ARCH = dict(depths=[1, 2, 1, 1], channels=[8, 12, 16, 20])


def detector(backbone: dict, **settings) -> dict:
    """Config of a RetinaNet of one class."""
    head = dict(
        type='mmdet.RetinaHead',
        num_classes=1,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='mmdet.AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=1,
            ratios=[1.0],
            strides=[4, 8, 16, 32, 64],
        ),
        bbox_coder=dict(type='mmdet.DeltaXYWHBBoxCoder'),
    )
    channels = ARCH['channels']
    return dict(
        type='mmdet.RetinaNet',
        data_preprocessor=dict(type='mmdet.DetDataPreprocessor'),
        backbone=backbone,
        neck=dict(type='mmdet.FPN', in_channels=channels, out_channels=8, num_outs=5),
        bbox_head=head,
        **settings,
    )


def segmentor(backbone: dict, **settings) -> dict:
    """Config of an FCN of two classes, for images of 64 x 64."""
    return dict(
        type='mmseg.EncoderDecoder',
        data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(64, 64)),
        backbone=backbone,
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=ARCH['channels'][-1],
            in_index=3,
            channels=8,
            num_convs=1,
            num_classes=2,
            norm_cfg=dict(type='BN'),
        ),
        **settings,
    )


def randomise(model: nn.Module) -> nn.Module:
    """Weights that let every parameter show in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.eval()
