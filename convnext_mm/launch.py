"""What ``tools/train.py`` and ``tools/test.py`` share: reading a config,
fitting it to the machine, and checking its data before anything starts."""
import argparse
import contextlib
import difflib
import os
import os.path as osp
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import torch.distributed
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS

from .checkpoint import CheckpointError
from .data_check import DataError, leaf_configs
from .runner import Runner

GPUS = ('cuda', 'npu', 'mlu', 'musa')
AMP_DEVICES = {  # what the wrappers of mixed precision do not refuse
    'AmpOptimWrapper': GPUS,
    'convnext_mm.AmpOptimWrapper': (*GPUS, 'cpu')
}
FUSED_DEVICES = ('cuda', 'cpu', 'mps')  # where PyTorch has fused optimizers
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
# Where users get the data of a dataset type, or None: it is their own.
DATA_SOURCES = {
    'CocoDataset':
    'COCO 2017 is at https://cocodataset.org/#download: unpack '
    'train2017, val2017 and annotations into data/coco',
    'ADE20KDataset':
    'ADE20K (SceneParsing, 2016) is at '
    'http://sceneparsing.csail.mit.edu: unpack it into data/ade',
    'ImageNet':
    'ImageNet-1K (ILSVRC 2012) is at https://image-net.org: put its folders '
    'of classes into data/imagenet/train and data/imagenet/val',
    'ImageNet21k':
    'ImageNet-22K is at https://image-net.org: put its folders of classes into '
    'data/imagenet22k/train',
}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that training and testing share."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and '
                        'metrics (default: work_dirs/CONFIG_NAME)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings to override, such as train_dataloader.batch_size=4 or '
        'key="[(1,2),(3,4)]" (no spaces inside the value)')
    parser.add_argument(
        '--data-root',
        metavar='DIR',
        help="where the data is, instead of the config's data_root")
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    # torchrun sets LOCAL_RANK itself; the older launcher passes an argument.
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0,
        help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """The config of parsed arguments, with overrides and the work folder set.

    Args:
        args: What :func:`add_common_arguments` adds, and ``config``.

    Raises:
        ValueError: There is no such config file (close ones are named), or
            ``--data-root`` is given and the config has no ``data_root``.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = Path(args.config)
    if not path.is_file():
        known = {
            p.name: p
            for p in Path('configs').rglob('*.py') if '_base_' not in p.parts
        }
        close = difflib.get_close_matches(path.name, known, n=3, cutoff=0.5)
        raise ValueError(
            f'config {args.config!r} does not exist' +
            (': did you mean ' + ' or '.join(str(known[c])
                                             for c in close) + '?'
             if close else '; give the path of a config, those of this '
             'project are below configs/'))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.data_root is not None:
        if not cfg.get('data_root'):
            raise ValueError(f'--data-root replaces the data_root of a config;'
                             f' {args.config} has none at its top level')
        _replace_prefix(cfg._cfg_dict, cfg.data_root,
                        osp.join(args.data_root, ''))
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', path.stem)
    return cfg


def _replace_prefix(node, old: str, new: str):
    """``node`` with the folder ``new`` (ends in a slash) for ``old`` in every
    path below; dicts and lists are changed in place."""
    if isinstance(node, str):
        is_below = node == old or node.startswith(osp.join(old, ''))
        return new + node[len(old):].lstrip('/') if is_below else node
    if isinstance(node, tuple):
        return tuple(_replace_prefix(item, old, new) for item in node)
    if isinstance(node, (dict, list)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            node[key] = _replace_prefix(node[key], old, new)
    return node


def fit_to_device(cfg: Config, device: Optional[str] = None) -> None:
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
    device = device or get_device()
    optim_wrapper = cfg.get('optim_wrapper') or {}
    if device not in AMP_DEVICES.get(optim_wrapper.get('type'), (device, )):
        optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            optim_wrapper.pop(key, None)
        _print_once(f'No mixed precision on {device}: training in fp32.')
    optimizer = optim_wrapper.get('optimizer') or {}
    if optimizer.get('fused') and device not in FUSED_DEVICES:
        optimizer.fused = False
        _print_once(f'No fused optimizer on {device}: the plain one.')
    if device != 'cpu':
        return
    cfg.setdefault('env_cfg', ConfigDict()).dist_cfg = dict(backend='gloo')
    if cfg.launcher == 'none':
        return
    # device_ids must be None for modules on a CPU; MMEngine would pass one.
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False))
    replaced = _replace_sync_bn(cfg.model)
    if replaced:
        _print_once(f'No SyncBN on a CPU: {replaced} norm settings use BN.')


def _print_once(message: str) -> None:
    # The process group is not up yet, so the launcher's variable says which.
    if os.environ.get('RANK', '0') == '0':
        print_log(message)


def _replace_sync_bn(node) -> int:
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


def check_data(cfg: Config, loaders: List[str]) -> None:
    """Checks that the files and folders of every dataset exist.

    Args:
        cfg: The whole config; ``data_help`` in it, if given, is the advice.
        loaders: Names of dataloaders, such as ``'train_dataloader'``.

    Raises:
        ValueError: Something is missing. Names the loader, the path and where
            to get the data.
    """
    for loader in loaders:
        if not cfg.get(loader):
            continue
        datasets = list(leaf_configs(cfg[loader].dataset))
        for dataset in datasets:
            for setting, path in _local_paths(dataset):
                if not path.exists():
                    advice = cfg.get('data_help') or DATA_SOURCES.get(
                        str(dataset.type).split('.')[-1],
                        'put the data there')
                    raise ValueError(
                        f'{loader}: {setting} {str(path)!r} does not exist '
                        f'(looked for from {os.getcwd()}). {advice}, or say '
                        'where the data is with --data-root DIR')
        _check_evaluator(cfg, loader, datasets)


def _check_evaluator(cfg: Config, loader: str,
                     datasets: List[ConfigDict]) -> None:
    """That COCO metrics read the annotations of the images they judge."""
    name = loader.replace('dataloader', 'evaluator')
    evaluators = cfg.get(name) or []
    for evaluator in (
            evaluators if isinstance(evaluators, list) else [evaluators]):
        if (not str(evaluator.get('type')).endswith('CocoMetric')
                or len(datasets) != 1
                or not str(datasets[0].get('type')).endswith('CocoDataset')):
            continue
        paths = dict(_local_paths(dict(ann_file=evaluator.get('ann_file'))))
        ours = dict(_local_paths(datasets[0])).get('ann_file')
        theirs = paths.get('ann_file')
        if theirs and ours and theirs.resolve() != ours.resolve():
            raise ValueError(
                f'{name}.ann_file is {str(theirs)!r}, but {loader} loads '
                f'{str(ours)!r}: give both the same file')


def _local_paths(dataset: ConfigDict) -> Iterator[Tuple[str, Path]]:
    """(setting, path) of what a dataset reads from the local disk."""
    if dataset.get('backend_args'):  # not a local disk
        return
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):  # MMPretrain's data sets
        prefixes = dict(img_path=prefixes)
    if not prefixes and 'split' in dataset:  # its ImageNet: a folder per split
        prefixes = dict(img_path=dataset.split)
    settings: Dict[str, str] = {'ann_file': dataset.get('ann_file')}
    settings.update((f'data_prefix.{key}', value)
                    for key, value in prefixes.items())
    root = dataset.get('data_root') or ''
    for setting, value in settings.items():
        path = osp.join(root, value) if isinstance(value, str) else ''
        if value and path and '://' not in path:
            yield setting, Path(path)


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """Ends the program with one sentence, not a traceback, on bad data and on
    a checkpoint that cannot be used."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        raise SystemExit(f'error: {error}')


def build_runner(cfg: Config) -> Runner:
    """The runner of a config; on a CPU, starts the process group first."""
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # MMEngine's start of a process group selects a CUDA device.
        torch.distributed.init_process_group('gloo')
    if 'runner_type' in cfg:
        return RUNNERS.build(cfg)
    return Runner.from_cfg(cfg)
