"""Finds files and folders that a config names and that do not exist."""

import difflib
import os
import os.path as osp
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict

from .data_check import leaf_configs
from .errors import DataError, short

# Where the published data of a type lies by default, and where users get it.
DATA_SOURCES = {
    'CocoDataset': (
        'data/coco',
        'COCO 2017 is at https://cocodataset.org/#download: unpack '
        'train2017, val2017 and annotations into data/coco',
    ),
    'ADE20KDataset': (
        'data/ade',
        'ADE20K (SceneParsing, 2016) is at '
        'http://sceneparsing.csail.mit.edu: unpack it into data/ade',
    ),
    'ImageNet': (
        'data/imagenet',
        'ImageNet-1K (ILSVRC 2012) is at https://image-net.org: put '
        'its folders of classes into data/imagenet/train and data/imagenet/val',
    ),
    'ImageNet21k': (
        'data/imagenet22k',
        'ImageNet-22K is at https://image-net.org: put its folders '
        'of classes into data/imagenet22k/train',
    ),
}


def check_data(cfg: Config, loaders: list[str]) -> None:
    """Checks that the files and folders of every dataset exist.

    Args:
        cfg: The whole config; ``data_help`` in it, if given, is the advice.
        loaders: Names of dataloaders, such as ``'train_dataloader'``.

    Raises:
        DataError: Something is missing. Names the loader, the path, what lies
            where it ends, and where to get data that is published.
    """
    for loader in loaders:
        if not cfg.get(loader):
            continue
        datasets = list(leaf_configs(cfg[loader].dataset))
        for dataset in datasets:
            for setting, path in _local_paths(dataset):
                if not path.exists():
                    near, is_close = _neighbours(path)
                    advice = cfg.get('data_help') or (
                        'Correct it' if is_close else _source(dataset)
                    )
                    raise DataError(
                        f'{loader}: {setting} {str(path)!r} does not exist '
                        f'(looked for from {os.getcwd()}): {near}. {advice}, or say '
                        'where the data is with --data-root DIR'
                    )
        _check_evaluator(cfg, loader, datasets)


def _source(dataset: ConfigDict) -> str:
    """What to do about data that is missing: to get it, if it is published."""
    folder, advice = DATA_SOURCES.get(str(dataset.type).split('.')[-1], ('', ''))
    root = Path(dataset.get('data_root') or '')
    is_own = 'classes' in (dataset.get('metainfo') or {})
    by_default = root.resolve().is_relative_to(Path(folder).resolve())
    # Where somebody named another folder and it is not there, the name is wrong.
    if folder and not is_own and (by_default or root.is_dir()):
        return advice
    return 'Correct it, put the data there'


def _neighbours(path: Path) -> tuple[str, bool]:
    """What there is where a path ends too early; whether a name is close to it."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    where = repr(str(parent))
    try:
        names = sorted(n for n in os.listdir(parent) if not n.startswith('.'))
    except OSError as error:
        return f'{where} cannot be listed ({error.strerror})', False
    if not names:
        return f'{where} is empty', False
    # Whatever the case of letters.
    lower = {name.lower(): name for name in names}
    close = [lower[n] for n in difflib.get_close_matches(missing.lower(), lower)]
    found = (
        'close to it ' + ' and '.join(map(repr, close)) if close else short(names, 5)
    )
    return f'{where} has no {missing!r}, but {found}', bool(close)


def _check_evaluator(cfg: Config, loader: str, datasets: list[ConfigDict]) -> None:
    """That COCO metrics read the annotations of the images they judge."""
    name = loader.replace('dataloader', 'evaluator')
    evaluators = cfg.get(name) or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if (
            not str(evaluator.get('type')).endswith('CocoMetric')
            or len(datasets) != 1
            or not str(datasets[0].get('type')).endswith('CocoDataset')
        ):
            continue
        paths = dict(_local_paths(dict(ann_file=evaluator.get('ann_file'))))
        ours = dict(_local_paths(datasets[0])).get('ann_file')
        theirs = paths.get('ann_file')
        if theirs and ours and theirs.resolve() != ours.resolve():
            raise DataError(
                f'{name}.ann_file is {str(theirs)!r}, but {loader} loads '
                f'{str(ours)!r}: give both the same file'
                + (
                    '; where it is data_root + name, data_root ends with a slash'
                    if str(theirs).replace('/', '') == str(ours).replace('/', '')
                    else ''
                )
            )


def _local_paths(dataset: ConfigDict) -> Iterator[tuple[str, Path]]:
    """(setting, path) of what a dataset reads from the local disk."""
    if dataset.get('backend_args'):  # not a local disk
        return
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):  # MMPretrain's data sets
        prefixes = dict(img_path=prefixes)
    if not prefixes and 'split' in dataset:  # its ImageNet: a folder per split
        prefixes = dict(img_path=dataset.split)
    settings: dict[str, str] = {'ann_file': dataset.get('ann_file')}
    settings.update((f'data_prefix.{key}', value) for key, value in prefixes.items())
    root = dataset.get('data_root') or ''
    if root and not any(settings.values()):  # a data set of a folder
        yield 'data_root', Path(root)
    for setting, value in settings.items():
        path = osp.join(root, value) if isinstance(value, str) else ''
        if value and path and '://' not in path:
            yield setting, Path(path)
