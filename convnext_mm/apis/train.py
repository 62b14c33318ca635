"""Training the model of a config."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from convnext_mm.checkpoint import check_source
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.hooks import ProfileFinished
from convnext_mm.engine.launch import fit_to_device, running
from convnext_mm.engine.sharding import check_sharding

from .config import load_config
from .config_check import check_config, check_paths
from .loggers import add_loggers


def prepare(
    config: str,
    amp: bool = False,
    auto_scale_lr: bool = False,
    resume: str | None = None,
    profile: int | None = None,
    overwrite: bool = False,
    loggers: Sequence[str] = (),
    **options: Any,
) -> Config:
    """The config to train, checked and fitted to the machine.

    Args:
        config: Path of the config, or name of a recipe.
        amp: Train in mixed precision, as
            :class:`convnext_mm.AmpOptimWrapper` picks it.
        auto_scale_lr: Scale the learning rate by batch size over the config's
            ``auto_scale_lr.base_batch_size``.
        resume: Checkpoint to go on from; ``'auto'``: the latest one in the
            work folder.
        profile: Profile so many steps, then stop.
        overwrite: Delete the checkpoints of another run in the work folder; with
            ``resume``, the newer ones.
        loggers: Also log there, see :func:`.loggers.add_loggers`.
        **options: Of :func:`convnext_mm.apis.config.load_config`.

    Raises:
        ConfigError, CheckpointError, DataError: A path or setting is wrong;
            says which and what to do.
    """
    check_paths(config)
    cfg = load_config(config, **options)
    if amp:
        cfg.optim_wrapper.type = 'convnext_mm.AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ConfigError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=False, '
                f'base_batch_size=...) in the config; {config} has none'
            )
        cfg.auto_scale_lr.enable = True
    if resume is not None:
        cfg.resume = True
        cfg.load_from = None if resume == 'auto' else resume
        if cfg.load_from:
            check_source(cfg.load_from)
    if profile is not None:
        if profile < 1:
            raise ConfigError(
                f'--profile takes a number of steps from 1 on, got {profile}'
            )
        hook = dict(type='convnext_mm.StepProfilerHook', steps=profile)
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
        # Neither validation nor a checkpoint between the steps.
        cfg.train_cfg.val_interval = sys.maxsize
        cfg.setdefault('default_hooks', {})['checkpoint'] = None
    add_loggers(cfg, loggers)
    cfg.overwrite = overwrite or cfg.get('overwrite', False)
    check_config(cfg, 'train')
    check_sharding(cfg)
    fit_to_device(cfg)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    return cfg


def train(config: str, **options: Any) -> None:
    """Trains, or profiles.

    Args:
        config: Path of the config, or name of a recipe.
        **options: Of :func:`prepare`.

    Raises:
        ConfigError: A path or setting is wrong.
        CheckpointError: A checkpoint to start or go on from cannot be used.
        DataError: The data is missing or bad.
    """
    cfg = prepare(config, **options)
    with running(cfg) as runner, contextlib.suppress(ProfileFinished):
        runner.train()
