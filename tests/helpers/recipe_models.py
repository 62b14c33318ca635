"""Configs of the recipes and what is built from them, for several tests."""

import copy
from functools import cache, lru_cache

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from convnext_mm.analysis.complexity import build_model
from repo import ROOT

FOLDERS = ('mask_rcnn', 'cascade', 'upernet', 'imagenet')
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py')
)


@cache
def load(path: str) -> Config:
    """A config, to be read only."""
    return Config.fromfile(ROOT / path)


@lru_cache(maxsize=2)
def model_of(path: str):
    """Its model on the meta device: real modules, no memory for weights."""
    return build_model(load(path))


@lru_cache(maxsize=2)
def optim_wrapper_of(path: str):
    """Its optimizer wrapper, built by its constructor."""
    init_default_scope(load(path).default_scope)
    return build_optim_wrapper(model_of(path), copy.deepcopy(load(path).optim_wrapper))


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
    import torch

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
