"""One training step of each kind of recipe, on real images, with a network and
heads cut down for a CPU."""
import copy
import math

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from recipe_models import RECIPES, load


def recipe(*words):
    return next(path for path in RECIPES if all(w in path for w in words))


def cut_down(cfg, width=16):
    model = copy.deepcopy(cfg.model)
    channels = [8, 16, 32, 64]
    model.backbone.update(
        arch=dict(depths=[1] * 4, channels=channels), init_cfg=None)
    if 'neck' in model:
        model.neck.in_channels = channels
        rcnn = model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 16
        model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
        model.neck.out_channels = width
        model.rpn_head.update(in_channels=width, feat_channels=width)
        roi = model.roi_head
        heads = roi.bbox_head if isinstance(roi.bbox_head,
                                            list) else [roi.bbox_head]
        for head in heads:
            head.update(in_channels=width, fc_out_channels=32)
            if 'Conv' in head.type:
                head.conv_out_channels = width
        roi.mask_head.update(in_channels=width, conv_out_channels=width)
        roi.bbox_roi_extractor.out_channels = width
        roi.mask_roi_extractor.out_channels = width
    else:
        model.decode_head.update(in_channels=channels, channels=width)
        model.auxiliary_head.update(in_channels=channels[2], channels=width)
    return model


def train_step(cfg, dataset, shape=None):
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cut_down(cfg))).train()
    data = model.data_preprocessor(
        pseudo_collate([dataset[0], dataset[1]]), training=True)
    if shape:
        assert tuple(data['inputs'].shape[2:]) == shape
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert math.isfinite(losses)
    assert all(p.grad is not None and p.grad.isfinite().all()
               for p in model.backbone.parameters())


@pytest.mark.parametrize('words', [('mask-rcnn_convnext-t_', ),
                                   ('mask-rcnn_convnext-v2-t', 'lsj'),
                                   ('cascade', 'convnext-t_')],
                         ids=' '.join)
def test_detector(words, shared_dir):
    cfg = load(recipe(*words))
    init_default_scope('mmdet')
    settings = dict(
        cfg.train_dataloader.dataset,
        data_root=str(shared_dir / 'data/coco_tiny'))
    train_step(cfg, DATASETS.build(settings),
               (1024, 1024) if 'lsj' in words else None)


def test_segmentor(shared_dir):
    cfg = load(recipe('convnext-base-in22k-pre_upernet'))
    init_default_scope('mmseg')
    settings = dict(
        cfg.train_dataloader.dataset,
        data_root=str(shared_dir / 'data/ade20k_sample'),
        data_prefix=dict(
            img_path='images/validation',
            seg_map_path='annotations/validation'))
    train_step(cfg, DATASETS.build(settings),
               tuple(cfg.model.data_preprocessor.size))
