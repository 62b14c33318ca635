"""One training step of each kind of recipe, on real images, with a network and
heads cut down for a CPU."""

import math

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope

from recipe_models import cut_down, load, recipe


def train_step(cfg, dataset, shape=None):
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cut_down(cfg))).train()
    data = model.data_preprocessor(
        pseudo_collate([dataset[0], dataset[1]]), training=True
    )
    if shape:
        assert tuple(data['inputs'].shape[2:]) == shape
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert math.isfinite(losses)
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.backbone.parameters()
    )


@pytest.mark.parametrize(
    'words',
    [
        ('mask-rcnn_convnext-t_',),
        ('mask-rcnn_convnext-v2-t', 'lsj'),
        ('cascade', 'convnext-t_'),
    ],
    ids=' '.join,
)
def test_detector(words, shared_dir):
    cfg = load(recipe(*words))
    init_default_scope('mmdet')
    settings = dict(
        cfg.train_dataloader.dataset, data_root=str(shared_dir / 'data/coco_tiny')
    )
    train_step(cfg, DATASETS.build(settings), (1024, 1024) if 'lsj' in words else None)


def test_segmentor(shared_dir):
    cfg = load(recipe('convnext-base-in22k-pre_upernet'))
    init_default_scope('mmseg')
    settings = dict(
        cfg.train_dataloader.dataset,
        data_root=str(shared_dir / 'data/ade20k_sample'),
        data_prefix=dict(
            img_path='images/validation', seg_map_path='annotations/validation'
        ),
    )
    train_step(cfg, DATASETS.build(settings), tuple(cfg.model.data_preprocessor.size))
