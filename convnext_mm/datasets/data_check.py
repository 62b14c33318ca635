"""Finds bad data before or as it is first loaded, and says which file it is and
what to do. Nothing here reads every image of a data set."""

import itertools
import logging
import math
import os
import os.path as osp
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from torch import nn
from torch.utils.data import Dataset

from .coco_file import CocoFile, explain_file, read, usable_boxes, usable_mask
from .errors import DataError as DataError
from .errors import UnreadableError, short
from .skip_unreadable import SkipUnreadable, skip_unreadable
from .worker_failures import explain_runtime_failure

NUM_SAMPLES = 8  # read from every data set before training starts
MAX_FILES = 200_000  # looked for; of more, evenly spaced ones
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


def check_dataset(
    dataset: Dataset,
    model: nn.Module | None = None,
    max_unreadable: int = 0,
    listing: Path | None = None,
) -> None:
    """Checks a built dataset, and from now on every sample that it loads.

    Its annotation file in COCO's format, the heads of the model; that its files
    exist; a few samples, spread over it. Its loading transforms are wrapped:
    an unreadable file, or a label above the class count, stops the run with the
    file named instead of much later or not at all; boxes and masks that cannot
    be used are left out.

    Args:
        dataset: Any; wrappers are looked into, others than MMEngine's left.
        model: The model that it is for.
        max_unreadable: So many images that are missing or unreadable another
            one replaces, in training; more stop the run. The workers of a
            process have one count.
        listing: Text file that gets a line for each of them.

    Raises:
        DataError: Something is wrong.
    """
    if type(max_unreadable) is not int or max_unreadable < 0:
        raise DataError(
            'max_unreadable_images is a number of images, 0 or more, got '
            f'{max_unreadable!r}'
        )
    found = [leaf for leaf in leaves(dataset) if isinstance(leaf, BaseDataset)]
    for leaf in found:
        leaf.full_init()
        if len(leaf) == 0:
            raise DataError(
                f'{_describe(leaf)} is empty: no image is left '
                f'(filter_cfg={leaf.filter_cfg}); look at its '
                'annotations and data_prefix'
            )
        _guard_loading(leaf)
    skips: list[SkipUnreadable] = []
    if max_unreadable and not any(leaf.test_mode for leaf in found):
        skips = skip_unreadable(found, max_unreadable, listing)
    problem: list[DataError | None] = [None]
    if is_main_process():
        try:
            for leaf, skip in itertools.zip_longest(found, skips):
                _check_coco_file(leaf)
                if model is not None:
                    _check_heads(leaf, getattr(model, 'module', model))
                _check_files(leaf, skip)
                _check_samples(leaf, skip)
        except DataError as error:
            problem[0] = error
    broadcast_object_list(problem)  # all processes end, or none
    if problem[0] is not None:
        raise problem[0]


def _check_samples(dataset: BaseDataset, skip: SkipUnreadable | None) -> None:
    """Loads a few samples, spread over the data set."""
    last = len(dataset) - 1
    for index in sorted({round(i) for i in np.linspace(0, last, NUM_SAMPLES)}):
        results = dataset.get_data_info(index)
        try:
            for loader in _loaders(dataset):
                results = results and loader(results)
        except UnreadableError as error:
            if skip is None:
                raise
            skip.note(index, error)


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
        explain_file(ann_file, classes)
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


def leaves(dataset: Dataset) -> Iterator[Dataset]:
    """The datasets inside wrappers such as RepeatDataset."""
    for name in ('datasets', 'dataset', '_dataset'):
        inner = getattr(dataset, name, None)
        if inner is not None:
            for item in inner if name == 'datasets' else [inner]:
                yield from leaves(item)
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


def _check_coco_file(dataset: BaseDataset) -> None:
    """Annotations in COCO's format, of which MMDetection leaves out without a
    word what it does not understand."""
    classes, ids = _classes(dataset), getattr(dataset, 'cat_ids', None)
    path = dataset.ann_file
    if classes is None or ids is None or not osp.isfile(path):
        return
    file = CocoFile(path, read(path))
    file.check_categories(classes, len(ids))
    with_mask = any(loader.with_mask for loader in _loaders(dataset))
    file.check_annotations(with_mask, dataset.test_mode)
    file.check_corners()
    if dataset.filter_cfg and not dataset.test_mode and dataset._indices is None:
        file.count_left_out(len(dataset), dataset.filter_cfg)


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
                f'{short(classes)}: set num_classes={len(classes)}, or '
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


def _check_files(dataset: BaseDataset, skip: SkipUnreadable | None) -> None:
    """That the images and class maps of a data set on a local disk exist, by
    listing folders."""
    if getattr(dataset, 'backend_args', None):
        return
    folders: dict[str, set[str]] = {}
    missing: dict[int, str] = {}
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
                missing[index] = path
    limit = skip.limit if skip else 0
    if len(missing) > limit:
        raise DataError(
            f'{_describe(dataset)}: {len(missing)} files of {len(indices)} '
            f'samples are missing, the first is {next(iter(missing.values()))!r}: put '
            f'them there, correct data_prefix ({dict(dataset.data_prefix)}), or '
            f'take them out of the data set{_skip_advice(dataset)}'
        )
    if skip:
        for index, path in missing.items():
            skip.note(index, UnreadableError(f'{path!r} does not exist'))
    _check_class_maps(dataset, limit)


def _check_class_maps(dataset: BaseDataset, limit: int) -> None:
    """That no more class maps of a folder lack their image: MMSegmentation lists
    images, and would leave them out without a word."""
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
    if not orphans:
        return
    image = osp.join(images, orphans[0][: -len(ending)] + dataset.img_suffix)
    message = (
        f'{len(orphans)} class maps have no image, the first is '
        f'{osp.join(maps, orphans[0])!r}: put {image!r} there, set '
        'img_suffix and seg_map_suffix, or take the map away'
    )
    if len(orphans) > limit:
        raise DataError(message + _skip_advice(dataset))
    print_log(message, logger='current', level=logging.WARNING)


def _skip_advice(dataset: BaseDataset) -> str:
    if dataset.test_mode:
        return ''
    return ' (training can do without a few: --cfg-options max_unreadable_images=N)'


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, relative to it."""
    for parent, _, names in os.walk(folder):
        for name in names:
            yield osp.normpath(osp.join(osp.relpath(parent, folder), name))


def _guard_loading(dataset: BaseDataset) -> None:
    """Wraps the loading transforms of a dataset in place."""
    transforms = getattr(dataset.pipeline, 'transforms', [])
    for index, transform in enumerate(transforms):
        if type(transform).__name__.startswith('Load'):
            transforms[index] = GuardedLoad(transform, dataset)


def _loaders(dataset: BaseDataset) -> list['GuardedLoad']:
    transforms = getattr(dataset.pipeline, 'transforms', [])
    return [t for t in transforms if isinstance(t, GuardedLoad)]


class GuardedLoad:
    """A loading transform that names the file it fails on, refuses a class map
    that does not fit the classes, and leaves out boxes and masks that cannot be
    used.

    Args:
        transform: Any callable of a dict, such as LoadImageFromFile.
        dataset: What it loads for.
    """

    def __init__(self, transform: Callable, dataset: BaseDataset) -> None:
        self.transform = transform
        self.loads_image = 'Image' in type(transform).__name__
        self.with_mask = bool(getattr(transform, 'with_mask', False))
        # MMSegmentation's datasets alone have both; panoptic maps differ.
        self.checks_labels = hasattr(dataset, 'ignore_index') and hasattr(
            dataset, 'reduce_zero_label'
        )
        self.ignore_index = getattr(dataset, 'ignore_index', None)
        self.num_classes = len(_classes(dataset) or ())
        self.skip_advice = _skip_advice(dataset)

    def __call__(self, results: dict) -> dict | None:
        has_map = bool(results.get('seg_map_path')) and not self.loads_image
        path = results.get('seg_map_path' if has_map else 'img_path')
        try:
            if not self.loads_image:
                self._leave_out(results)
            loaded = self.transform(results)
        except Exception as error:
            if explain_runtime_failure(error):  # no fault of the file
                raise
            reason = (
                'does not exist'
                if isinstance(error, FileNotFoundError)
                else 'cannot be read ('
                + ' '.join(f'{type(error).__name__}: {error}'.split())
                + ')'
            )
            fault = f'{path!r} {reason}'
            advice = f'{fault}: replace it, or take it out of the data set'
            if self.loads_image or has_map:
                raise UnreadableError(advice + self.skip_advice, fault) from error
            raise DataError(f'the annotation of {advice}') from error
        if self.checks_labels and self.num_classes and loaded and has_map:
            self._check_labels(
                loaded.get('gt_seg_map'), path, results.get('reduce_zero_label')
            )
        return loaded

    def _leave_out(self, results: dict) -> None:
        """What :mod:`.coco_file` calls unusable."""
        instances, shape = results.get('instances'), results.get('ori_shape')
        if not instances or not shape or 'bbox' not in instances[0]:
            return
        height, width = shape[:2]
        corners = np.array([item['bbox'] for item in instances], dtype=float)
        if corners.shape[1:] == (4,):
            usable = usable_boxes(corners, np.array([width, height]))
            instances = [item for item, keep in zip(instances, usable) if keep]
            results['instances'] = instances
        if self.with_mask:
            for item in instances:
                # Of an object without one MMDetection ignores the region.
                item['mask'] = usable_mask(item.get('mask'), width, height)

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
                f'{path!r} has the labels {short(bad)}{after}, but there are '
                f'{self.num_classes} classes, 0 to {self.num_classes - 1}, and'
                f' {self.ignore_index} is ignored: add names to '
                'metainfo.classes and raise num_classes of the heads, set '
                'ignore_index, or correct the map'
            )

    def __repr__(self) -> str:
        return repr(self.transform)
