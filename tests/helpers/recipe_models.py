"""Configs of the recipes and what is built from them, for several tests."""

import copy
from functools import cache, lru_cache
from importlib import import_module

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope, init_default_scope
from mmengine.structures import PixelData

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis.config import load_config
from convnext_mm.engine.launch import fit_to_device
from repo import ROOT

FOLDERS = ('mask_rcnn', 'cascade', 'upernet', 'imagenet')
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py')
)


@cache
def _read(path: str) -> Config:
    return Config.fromfile(ROOT / path)


def load(path: str) -> Config:
    """A config; changing it changes no other test's."""
    return copy.deepcopy(_read(path))


@lru_cache(maxsize=2)
def model_of(path: str):
    """Its model on the meta device: real modules, no memory for weights."""
    return build_model(load(path))


@lru_cache(maxsize=2)
def optim_wrapper_of(path: str):
    """Its optimizer wrapper, built by its constructor."""
    init_default_scope(load(path).default_scope)
    return build_optim_wrapper(model_of(path), load(path).optim_wrapper)


def learning_rates(cfg, optimizer, epoch_length, num_iters, sample):
    """Steps a config's schedulers as the runner's hook does.

    Args:
        optimizer: With initial learning rates; changed.
        epoch_length: Iterations in an epoch.
        num_iters: Of the whole training.
        sample: Iterations to look at.

    Returns:
        dict: Iteration to the learning rates of all groups in it.
    """
    schedulers = [
        PARAM_SCHEDULERS.build(
            copy.deepcopy(spec),
            default_args=dict(optimizer=optimizer, epoch_length=epoch_length),
        )
        for spec in cfg.param_scheduler
    ]
    by_iter = [s for s in schedulers if not s.by_epoch]
    by_epoch = [s for s in schedulers if s.by_epoch]
    sample, seen = set(sample), {}
    for iteration in range(num_iters):
        if iteration in sample:
            seen[iteration] = [g['lr'] for g in optimizer.param_groups]
        for scheduler in by_iter:
            scheduler.step()
        if (iteration + 1) % epoch_length == 0:
            for scheduler in by_epoch:
                scheduler.step()
    return seen


def stand_in(learning_rates_):
    """A cheap optimizer with these initial learning rates."""
    return torch.optim.SGD(
        [
            dict(params=[torch.nn.Parameter(torch.zeros(()))], lr=lr)
            for lr in learning_rates_
        ]
    )


def recipe(*words: str) -> str:
    """The first recipe with these words in its path."""
    return next(path for path in RECIPES if all(w in path for w in words))


def cut_down(cfg: Config, width: int = 16) -> dict:
    """The model of a recipe, small enough for a CPU."""
    model = copy.deepcopy(cfg.model)
    channels = [8, 16, 32, 64]
    model.backbone.update(arch=dict(depths=[1] * 4, channels=channels), init_cfg=None)
    if 'neck' in model:
        model.neck.in_channels = channels
        rcnn = model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 16
        model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
        model.neck.out_channels = width
        model.rpn_head.update(in_channels=width, feat_channels=width)
        roi = model.roi_head
        heads = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
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


# An arch that takes the place of any other: necks and heads follow by themselves.
TOY = dict(_delete_=True, depths=(1, 1, 2, 1), channels=(16, 24, 32, 40))
TOY_SIZE = (64, 64)  # of images for segmentors, whose 150 logits are as large
FEW_PROPOSALS = {
    'train_cfg.rpn_proposal.max_per_img': 50,
    'train_cfg.rcnn.sampler.num': 32,
    'test_cfg.rpn.max_per_img': 50,
}


def toy(path, settings: dict) -> Config:
    """A config of any recipe for a CPU.

    Args:
        path: Of the config.
        settings: Dotted names below ``model`` to what makes it small.
    """
    changes = {'backbone.arch': TOY, 'backbone.init_cfg': None, **settings}
    cfg = load_config(
        str(ROOT / path), cfg_options={f'model.{k}': v for k, v in changes.items()}
    )
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = TOY_SIZE  # it pads to that
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    fit_to_device(cfg, 'cpu')
    return cfg


def build_toy(cfg: Config):
    """(model with initial weights, optimizer wrapper)."""
    DefaultScope.get_instance(str(id(cfg)), scope_name=cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
        return model, build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))


def toy_inputs(cfg: Config) -> dict:
    """Two images with annotations, as the loader of a toy gives them."""
    scope = cfg.default_scope
    if scope in ('mmdet', 'mmrotate'):
        special = dict(
            mmdet=dict(
                num_classes=80,
                with_mask="'with_mask': True" in str(cfg.train_dataloader.to_dict()),
            ),
            mmrotate=dict(num_classes=15, use_box_type=True),
        )
        return import_module(f'{scope}.testing').demo_mm_inputs(
            2, [(3, 128, 128)] * 2, [3, 2], **special[scope]
        )
    if scope == 'mmpose':
        from mmpose.testing import get_packed_inputs

        # Sizes are width, height; of the image height, width.
        sizes = dict(input_size=(192, 256), heatmap_size=(48, 64))
        return get_packed_inputs(2, img_shape=(256, 192), **sizes)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 255, (3, *TOY_SIZE), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    ]
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(label) for label in (1, 0)]
    else:
        from mmseg.structures import SegDataSample

        sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape'), TOY_SIZE)
        samples = [
            SegDataSample(
                gt_sem_seg=PixelData(
                    data=torch.randint(0, 6, (1, *TOY_SIZE), generator=generator)
                ),
                metainfo=sizes,
            )
            for _ in range(2)
        ]
    return dict(inputs=images, data_samples=samples)


def train_and_run(cfg: Config):
    """A training step and a prediction of a toy.

    Returns:
        (model, optimizer wrapper, results).
    """
    scope = cfg.default_scope
    model, optim_wrapper = build_toy(cfg)
    with DefaultScope.overwrite_default_scope(scope):
        model.train()
        for _ in range(cfg.optim_wrapper.get('accumulative_counts', 1)):
            log = model.train_step(toy_inputs(cfg), optim_wrapper)
        model.eval()
        with torch.no_grad():
            results = model.test_step(toy_inputs(cfg))
    assert torch.isfinite(log['loss'])
    assert len(results) == 2
    if scope == 'mmseg':
        assert results[0].pred_sem_seg.data.shape == (1, *TOY_SIZE)
    elif scope == 'mmpretrain':
        assert results[0].pred_score.sum() == pytest.approx(1)
    else:
        assert 'bboxes' in results[0].pred_instances
    # Every parameter that trains got a gradient: DDP needs that.
    state = optim_wrapper.optimizer.state
    for name, param in model.backbone.named_parameters():
        if param.requires_grad:
            moment = state[param].get('exp_avg', state[param].get('momentum_buffer'))
            assert moment is not None and moment.any(), name
    return model, optim_wrapper, results
