"""Configs of the recipes and what is built from them, for several tests."""
import copy
from functools import lru_cache
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope

from convnext_mm.complexity import build_model

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('mask_rcnn', 'cascade', 'upernet', 'imagenet')
RECIPES = sorted(
    str(path.relative_to(ROOT)) for folder in FOLDERS
    for path in (ROOT / 'configs' / folder).glob('*.py'))
load_yaml = lru_cache(maxsize=None)(config_utils.load)


@lru_cache(maxsize=None)
def load(path: str) -> Config:
    """A config, to be read only."""
    with pytest.MonkeyPatch.context() as patch:
        # For each `mmdet::` MMEngine reads a hundred YAML files again.
        patch.setattr(config_utils, 'load', load_yaml)
        return Config.fromfile(ROOT / path)


@lru_cache(maxsize=2)
def model_of(path: str):
    """Its model on the meta device: real modules, no memory for weights."""
    return build_model(load(path))


@lru_cache(maxsize=2)
def optim_wrapper_of(path: str):
    """Its optimizer wrapper, built by its constructor."""
    init_default_scope(load(path).default_scope)
    return build_optim_wrapper(
        model_of(path), copy.deepcopy(load(path).optim_wrapper))


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
            default_args=dict(optimizer=optimizer, epoch_length=epoch_length))
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
    return torch.optim.SGD([
        dict(params=[torch.nn.Parameter(torch.zeros(()))], lr=lr)
        for lr in learning_rates_
    ])
