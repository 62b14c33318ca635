"""Finds bad data before or as it is first loaded, and says which file it is and
what to do. Nothing here reads every image of a data set."""

import json
import math
import os
import os.path as osp
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from torch import nn
from torch.utils.data import Dataset

NUM_SAMPLES = 8  # read from every data set before training starts
MAX_FILES = 200_000  # looked for; of more, evenly spaced ones
# The order of categories is compared in annotation files up to this size.
MAX_JSON_BYTES = 64 * 2**20
COCO_KEYS = dict(
    images=('id', 'file_name', 'height', 'width'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
# Modules whose num_classes is that of the data set, by their last name.
CLASS_HEADS = (
    'bbox_head',
    'mask_head',
    'mask_iou_head',
    'panoptic_head',
    'decode_head',
    'auxiliary_head',
    'head',
)
# Heads with a count of their own, in spite of such a name.
OWN_COUNT = ('RPNHead', 'GARPNHead', 'FusedSemanticHead')


class DataError(ValueError):
    """Bad data. The message names the file and what to do."""

    def __init__(self, message: str) -> None:
        # A worker process sends its whole traceback as the message.
        if message.startswith('Caught DataError in '):
            message = message.rsplit('DataError: ', 1)[-1].strip()
        super().__init__(message)


def check_dataset(dataset: Dataset, model: nn.Module | None = None) -> None:
    """Checks a built dataset, and from now on every sample that it loads.

    Its classes against its annotation file and the heads of the model; that
    its files exist; a few samples, spread over it. Its loading transforms are
    wrapped so that an unreadable file, or a label above the class count, stops
    the run with the file named instead of much later or not at all.

    Args:
        dataset: Any; wrappers are looked into, others than MMEngine's left.
        model: The model that it is for.

    Raises:
        DataError: Something is wrong.
    """
    for leaf in _leaves(dataset):
        if not isinstance(leaf, BaseDataset):
            continue
        leaf.full_init()
        if len(leaf) == 0:
            raise DataError(
                f'{_describe(leaf)} is empty: no image is left '
                f'(filter_cfg={leaf.filter_cfg}); look at its '
                'annotations and data_prefix'
            )
        _check_categories(leaf)
        if model is not None:
            _check_heads(leaf, getattr(model, 'module', model))
        if is_main_process():
            _check_files(leaf)
        loaders = _guard_loading(leaf)
        if is_main_process():
            last = len(leaf) - 1
            for index in sorted({round(i) for i in np.linspace(0, last, NUM_SAMPLES)}):
                _load(leaf.get_data_info(index), loaders)


def explain_failure(cfg: ConfigDict) -> None:
    """Looks for the reason why a dataset could not be built.

    Args:
        cfg: Config of a dataset without wrappers.

    Raises:
        DataError: A reason was found.
    """
    root = cfg.get('data_root') or ''
    prefix = cfg.get('data_prefix') or {}
    ann_file = osp.join(root, cfg.get('ann_file') or '')
    classes = (cfg.get('metainfo') or {}).get('classes')
    if ann_file.endswith('.json') and osp.isfile(ann_file):
        _explain_coco(ann_file, classes)
    folder = osp.join(root, prefix.get('img_path') or '')
    suffix = cfg.get('img_suffix', '.jpg')
    if (
        'img_path' in prefix
        and osp.isdir(folder)
        and not any(
            name.endswith(suffix) for _, _, names in os.walk(folder) for name in names
        )
    ):
        found = sorted(os.listdir(folder))[:3]
        raise DataError(
            f'no file in {folder!r} ends in img_suffix={suffix!r}'
            f' (it has {found or "nothing"}): put images there or '
            'set img_suffix'
        )


def leaf_configs(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """Configs of the datasets inside wrappers such as RepeatDataset."""
    if 'datasets' in dataset or 'dataset' in dataset:
        for inner in dataset.get('datasets', [dataset.get('dataset')]):
            yield from leaf_configs(inner)
    else:
        yield dataset


def _explain_coco(path: str, classes: Sequence[str] | None) -> None:
    try:
        with open(path) as file:
            data = json.load(file)
    except ValueError as error:
        raise DataError(
            f'{path!r} is not a JSON file ({error}): write it again'
        ) from error
    missing = [
        key
        for key in COCO_KEYS
        if not isinstance(data, dict) or not isinstance(data.get(key), list)
    ]
    if missing:
        raise DataError(
            f'{path!r} has no lists {missing}: COCO format has {tuple(COCO_KEYS)}'
        )
    for key, fields in COCO_KEYS.items():
        for item in data[key]:
            lacking = [field for field in fields if field not in item]
            if lacking:
                raise DataError(
                    f'{path!r}: an item of {key!r} '
                    f'(id {item.get("id")}) has no {lacking}: COCO '
                    f'format has {fields}'
                )
    if not data['images']:
        raise DataError(f'{path!r} lists no images: name another ann_file')
    names = {item['id']: item['name'] for item in data['categories']}
    if classes is not None and not any(
        names.get(item['category_id']) in classes for item in data['annotations']
    ):
        raise DataError(
            f'{path!r} has no annotation of metainfo.classes='
            f'{tuple(classes)}; its categories are {tuple(names.values())}: '
            'give those that you want, spelled as there'
        )


def _leaves(dataset: Dataset) -> Iterator[Dataset]:
    """The datasets inside wrappers."""
    for name in ('datasets', 'dataset', '_dataset'):
        inner = getattr(dataset, name, None)
        if inner is not None:
            for item in inner if name == 'datasets' else [inner]:
                yield from _leaves(item)
            return
    yield dataset


def _describe(dataset: BaseDataset) -> str:
    where = (
        dataset.ann_file
        or (dataset.data_prefix or {}).get('img_path')
        or dataset.data_root
    )
    return f'{type(dataset).__name__} of {where!r}'


def _classes(dataset: BaseDataset) -> list[str] | None:
    classes = dataset.metainfo.get('classes')
    if isinstance(classes, str):
        raise DataError(
            f'metainfo.classes={classes!r} of {_describe(dataset)} is one '
            f'string, not a sequence of names: write ({classes!r}, ) with a '
            'comma for one class'
        )
    return None if classes is None else list(classes)


def _check_categories(dataset: BaseDataset) -> None:
    """Classes against the categories of an annotation file in COCO's format."""
    classes, ids = _classes(dataset), getattr(dataset, 'cat_ids', None)
    path = dataset.ann_file
    if classes is None or ids is None or not osp.isfile(path):
        return
    if len(ids) == len(classes) and osp.getsize(path) > MAX_JSON_BYTES:
        return
    with open(path) as file:
        data = json.load(file)
    names = [item['name'] for item in data.get('categories', [])]
    unknown = [name for name in classes if name not in names]
    if unknown or len(ids) != len(classes):
        raise DataError(
            f'{path!r} has {len(names)} categories, {_short(names)}, and no '
            f'{_short(unknown)}, which metainfo.classes ({len(classes)} names)'
            ' has: give metainfo=dict(classes=...) of this data set the names '
            'of the file, and num_classes of the heads their number'
        )
    # MMDetection numbers the classes in the order of the file.
    if [name for name in names if name in classes] != classes:
        raise DataError(
            f'metainfo.classes={_short(classes)} must stand in the order of '
            f'the categories of {path!r}, {_short(names)}: labels are numbered'
            ' in that order, and would be shown under wrong names'
        )
    left_out = [name for name in names if name not in classes]
    if left_out:
        print_log(
            f'{path}: annotations of {_short(left_out)} are left out, since '
            'metainfo.classes does not have them',
            logger='current',
        )


def _check_heads(dataset: BaseDataset, model: nn.Module) -> None:
    """num_classes and ignore_index of the heads against the data set's."""
    classes = _classes(dataset)
    # Text-conditioned and panoptic models count otherwise.
    if (
        classes is None
        or getattr(dataset, 'return_classes', False)
        or 'thing_classes' in dataset.metainfo
    ):
        return
    ignore_index = getattr(dataset, 'ignore_index', None)
    for name, module in model.named_modules():
        parts = [part for part in name.split('.') if not part.isdigit()]
        count = getattr(module, 'num_classes', None)
        if (
            not parts
            or parts[-1] not in CLASS_HEADS
            or type(module).__name__ in OWN_COUNT
            or getattr(module, 'class_agnostic', False)
        ):
            continue
        if isinstance(count, int) and count != len(classes):
            raise DataError(
                f'model.{name}.num_classes is {count}, but '
                f'{_describe(dataset)} has {len(classes)} classes, '
                f'{_short(classes)}: set num_classes={len(classes)}, or '
                'metainfo=dict(classes=...) of the data set'
            )
        # Another label than the usual one must be ignored by both.
        if (
            ignore_index not in (None, 255)
            and getattr(module, 'ignore_index', ignore_index) != ignore_index
        ):
            raise DataError(
                f'model.{name}.ignore_index is {module.ignore_index}, but '
                f'{_describe(dataset)} has ignore_index={ignore_index}: give '
                'both the same'
            )


def _check_files(dataset: BaseDataset) -> None:
    """That the images and class maps of a data set on a local disk exist, by
    listing folders."""
    if getattr(dataset, 'backend_args', None):
        return
    folders: dict[str, set[str]] = {}
    missing: list[str] = []
    step = max(1, math.ceil(len(dataset) / MAX_FILES))
    indices = range(0, len(dataset), step)
    for index in indices:
        info = dataset.get_data_info(index)
        for key in ('img_path', 'seg_map_path'):
            path = info.get(key)
            if not isinstance(path, str) or '://' in path:
                continue
            folder, name = osp.split(path)
            if folder not in folders:
                folders[folder] = set(
                    os.listdir(folder or '.') if osp.isdir(folder or '.') else ()
                )
            if name not in folders[folder]:
                missing.append(path)
    if missing:
        raise DataError(
            f'{_describe(dataset)}: {len(missing)} files of {len(indices)} '
            f'samples are missing, the first is {missing[0]!r}: put them '
            f'there, correct data_prefix ({dict(dataset.data_prefix)}), or '
            'take them out of the data set'
        )
    _check_class_maps(dataset)


def _check_class_maps(dataset: BaseDataset) -> None:
    """That no class map of a folder lacks its image: MMSegmentation lists
    images, and would leave it out without a word."""
    prefix = dataset.data_prefix or {}
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    ending = getattr(dataset, 'seg_map_suffix', None)
    if (
        not ending
        or not hasattr(dataset, 'img_suffix')
        or osp.isfile(dataset.ann_file)
        or not images
        or not maps
        or not osp.isdir(maps)
    ):
        return
    present = set(_walk(images))
    orphans = sorted(
        name
        for name in _walk(maps)
        if name.endswith(ending)
        and name[: -len(ending)] + dataset.img_suffix not in present
    )
    if orphans:
        image = osp.join(images, orphans[0][: -len(ending)] + dataset.img_suffix)
        raise DataError(
            f'{len(orphans)} class maps have no image, the first is '
            f'{osp.join(maps, orphans[0])!r}: put {image!r} there, set '
            'img_suffix and seg_map_suffix, or take the map away'
        )


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, relative to it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield osp.normpath(osp.join(osp.relpath(parent, folder), name))


def _guard_loading(dataset: BaseDataset) -> list[Callable]:
    """Wraps the loading transforms of a dataset in place; returns them."""
    transforms = getattr(dataset.pipeline, 'transforms', [])
    for index, transform in enumerate(transforms):
        if type(transform).__name__.startswith('Load'):
            transforms[index] = GuardedLoad(transform, dataset)
    return [t for t in transforms if isinstance(t, GuardedLoad)]


def _load(results: dict | None, loaders: list[Callable]) -> None:
    for loader in loaders:
        if results is not None:
            results = loader(results)


class GuardedLoad:
    """A loading transform that names the file it fails on, and refuses a class
    map that does not fit the classes.

    Args:
        transform: Any callable of a dict, such as LoadImageFromFile.
        dataset: What it loads for.
    """

    def __init__(self, transform: Callable, dataset: BaseDataset) -> None:
        self.transform = transform
        # MMSegmentation's datasets alone have both; panoptic maps differ.
        self.checks_labels = hasattr(dataset, 'ignore_index') and hasattr(
            dataset, 'reduce_zero_label'
        )
        self.ignore_index = getattr(dataset, 'ignore_index', None)
        self.num_classes = len(_classes(dataset) or ())

    def __call__(self, results: dict) -> dict | None:
        loads_image = 'Image' in type(self.transform).__name__
        has_map = bool(results.get('seg_map_path')) and not loads_image
        path = results.get('seg_map_path' if has_map else 'img_path')
        try:
            loaded = self.transform(results)
        except Exception as error:
            what = (
                repr(path) if loads_image or has_map else f'the annotation of {path!r}'
            )
            reason = (
                'does not exist'
                if isinstance(error, FileNotFoundError)
                else 'cannot be read ('
                + ' '.join(f'{type(error).__name__}: {error}'.split())
                + ')'
            )
            raise DataError(
                f'{what} {reason}: replace it, or take it out of the data set'
            ) from error
        if self.checks_labels and self.num_classes and loaded and has_map:
            self._check_labels(
                loaded.get('gt_seg_map'), path, results.get('reduce_zero_label')
            )
        return loaded

    def _check_labels(self, labels: np.ndarray | None, path: Any, reduced: Any) -> None:
        if labels is None:
            return
        if labels.ndim != 2:
            raise DataError(
                f'{path!r} is a picture of shape {labels.shape}; a class map '
                'has one channel of class numbers: convert its colours'
            )
        found = np.flatnonzero(np.bincount(labels.reshape(-1)))
        bad = found[(found >= self.num_classes) & (found != self.ignore_index)].tolist()
        if bad:
            after = ' (after reduce_zero_label made 1 into 0)' * bool(reduced)
            raise DataError(
                f'{path!r} has the labels {_short(bad)}{after}, but there are '
                f'{self.num_classes} classes, 0 to {self.num_classes - 1}, and'
                f' {self.ignore_index} is ignored: add names to '
                'metainfo.classes and raise num_classes of the heads, set '
                'ignore_index, or correct the map'
            )

    def __repr__(self) -> str:
        return repr(self.transform)


def _short(items: Sequence) -> str:
    shown = ', '.join(map(str, items[:10]))
    return f'[{shown}, ...]' if len(items) > 10 else f'[{shown}]'
