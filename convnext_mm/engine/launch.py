"""Fitting a config to the machine, and its runner."""

import contextlib
import gc
import os
import signal
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner as MMEngineRunner

from .agreement import Interrupted
from .errors import ConfigError
from .network import choose_interface
from .runner import Runner
from .sharding import is_sharded
from .work_folder import check_writable

GPUS = ('cuda', 'npu', 'mlu', 'musa')
AMP_DEVICES = {  # what the wrappers of mixed precision do not refuse
    'AmpOptimWrapper': GPUS,
    'convnext_mm.AmpOptimWrapper': (*GPUS, 'cpu'),
}
FUSED_DEVICES = ('cuda', 'cpu', 'mps')  # where PyTorch has fused optimizers


def fit_to_device(cfg: Config, device: str | None = None) -> None:
    """Changes, in place, what a config asks for and a device cannot do.

    Without a device that mixed precision supports, training is in fp32;
    without one that has fused optimizers, the plain one updates the weights;
    on a CPU processes talk through gloo and synchronised batch norm, which has
    no CPU kernel, becomes batch norm. (In a single process MMEngine itself
    turns it into batch norm and says so.) Each change is one log line.

    Args:
        cfg: The whole config.
        device: Device type; by default the one MMEngine picks.
    """
    device = str(device or get_device())
    optim_wrapper = cfg.get('optim_wrapper') or ConfigDict()
    if device not in AMP_DEVICES.get(optim_wrapper.get('type'), (device,)):
        optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            optim_wrapper.pop(key, None)
        _print_once(f'No mixed precision on {device}: training in fp32.')
    optimizer = optim_wrapper.get('optimizer') or ConfigDict()
    if optimizer.get('fused') and device not in FUSED_DEVICES:
        optimizer.fused = False
        _print_once(f'No fused optimizer on {device}: the plain one.')
    if device != 'cpu':
        return
    env_cfg = cfg.setdefault('env_cfg', ConfigDict())
    env_cfg.dist_cfg = dict(env_cfg.get('dist_cfg') or {}, backend='gloo')
    if cfg.launcher == 'none':
        return
    # device_ids must be None for modules on a CPU; MMEngine would pass one.
    if not is_sharded(cfg):
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    replaced = _replace_sync_bn(cfg.model)
    if replaced:
        _print_once(f'No SyncBN on a CPU: {replaced} norm settings use BN.')


def _print_once(message: str) -> None:
    # The process group is not up yet, so the launcher's variable says which.
    if os.environ.get('RANK', '0') == '0':
        print_log(message)


def _replace_sync_bn(node: Any) -> int:
    """Turns ``type='SyncBN'`` into BN below ``node``; gives their number."""
    if isinstance(node, (list, tuple)):
        return sum(map(_replace_sync_bn, node))
    if not isinstance(node, dict):
        return 0
    count = 0
    if node.get('type') in ('SyncBN', 'MMSyncBN'):
        node['type'] = 'BN'
        count = 1
    return count + sum(map(_replace_sync_bn, node.values()))


def timeout(cfg: Config) -> timedelta | None:
    """``env_cfg.dist_cfg.timeout``, in seconds as MMEngine has it; None: PyTorch's.

    Raises:
        ConfigError: It is no such number.
    """
    seconds = (cfg.get('env_cfg') or {}).get('dist_cfg', {}).get('timeout')
    if seconds is None or isinstance(seconds, timedelta):
        return seconds
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ConfigError(
            f'env_cfg.dist_cfg.timeout is a number of seconds above 0, got {seconds!r}'
        )
    return timedelta(seconds=seconds)


@contextlib.contextmanager
def process_group(cfg: Config) -> Iterator[None]:
    """Ends the process group of a run that is over; on a CPU, starts it first.

    What still holds the group, a wrapped model above all, must be gone by then:
    only without any holder does gloo end its threads, and a thread that lets go
    of a tensor while Python shuts down aborts the process.
    """
    if cfg.launcher == 'pytorch':
        # A job of one process on each machine may set RANK alone.
        os.environ.setdefault('LOCAL_RANK', '0')
        if get_device() == 'cpu':
            # MMEngine's start of a process group selects a CUDA device.
            choose_interface()
            torch.distributed.init_process_group('gloo', timeout=timeout(cfg))
    try:
        yield
    except Interrupted as stop:
        if not stop.alone:
            _end_process_group(cfg)
        raise
    # Not after an error: the other processes may wait in a collective.
    _end_process_group(cfg)


def _end_process_group(cfg: Config) -> None:
    if cfg.launcher != 'none' and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def running(cfg: Config) -> Iterator[MMEngineRunner]:
    """The runner of a config, inside its :func:`process_group`.

    After a block without error, or one that a signal ended, the runner is empty,
    and the processes that loaded its data have ended.

    Raises:
        ConfigError: Nothing can be written into the work folder.
    """
    check_writable(cfg.work_dir)
    with process_group(cfg):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        try:
            yield runner
        except Interrupted as error:
            # A launcher or Slurm ends what is left as soon as one process ended.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            traceback.clear_frames(error.__traceback__)
            vars(runner).clear()
            raise
        # Its parts hold it. A data loader that is found among garbage has lost
        # the queues through which it ends its processes, and waits 5 seconds
        # for each.
        vars(runner).clear()
