"""Files in COCO's format: what they lack, and what training cannot use of them.

What one rule calls unusable is counted when training starts, and left out when
a sample is loaded.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from .errors import DataError, short

COCO_KEYS = dict(
    images=('id', 'file_name', 'height', 'width'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'),
)
SIDES = ('width', 'height')
BOX_CONFIG = 'configs/custom/faster-rcnn_convnext-t_fpn_1x_coco.py'
EXAMPLES = 3  # annotations named for each fault
# Corners taken for x, y, width, height end beyond the image where the centre is
# in its right or lower half (four of five boxes of COCO); widths and heights
# taken for corners are right of x and below y rarely (one in ten), never always.
CORNERS_BEYOND = 0.1
CORNERS_FIT = 0.99
NO_MASK = 'without segmentation'
NO_POLYGON = 'whose polygon has fewer than 3 points or lies far outside of the image'
SOME_POLYGON = 'of whose polygons one does (the others stay)'
BAD_RLE = 'with a run-length encoding of another size than the image'
MASK_FAULTS = (NO_MASK, NO_POLYGON, SOME_POLYGON, BAD_RLE)
# What MMDetection read, by path, until it is checked.
_kept: dict[str, Any] = {}


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """Within it :func:`read` gives what a data set has read before: the file of
    a large data set takes half a minute."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        yield
        return
    original = COCO.__init__

    def keeping(self: Any, annotation_file: str | None = None) -> None:
        original(self, annotation_file)
        if annotation_file is not None and is_main_process():
            _kept[annotation_file] = self.dataset

    COCO.__init__ = keeping
    try:
        yield
    finally:
        COCO.__init__ = original
        _kept.clear()


def read(path: str) -> Any:
    """The content of an annotation file.

    Raises:
        DataError: It is no JSON file.
    """
    if path in _kept:
        return _kept.pop(path)
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:
        raise DataError(
            f'{path!r} is not a JSON file ({error}): write it again'
        ) from error


def explain_file(path: str, classes: Sequence[str] | None) -> None:
    """Looks for the reason why MMDetection cannot make a data set of a file.

    Raises:
        DataError: A reason was found.
    """
    data = read(path)
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
    seen = set()
    for item in data['annotations']:
        box = item['bbox']
        if (
            not isinstance(box, list)
            or [type(number) in (int, float) for number in box] != [True] * 4
        ):
            raise DataError(
                f'{path!r}: the bbox of annotation {item["id"]} is {box!r}: COCO '
                'format has [x, y, width, height] in pixels'
            )
        if item['id'] in seen:
            raise DataError(
                f'{path!r} has several annotations of the id {item["id"]}: number '
                'them anew'
            )
        seen.add(item['id'])
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


def usable_boxes(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes are finite, and reach no farther beyond their image than it is
    wide and high. Objects that an image cuts off are annotated beyond its edge;
    RoIAlign asks for terabytes for a box of 1e30 pixels.

    Args:
        corners: (N, 4) x1, y1, x2, y2 in pixels.
        sizes: (N, 2) or (2,), width and height of their images in pixels.

    Returns:
        (N,) bool.
    """
    return (
        np.isfinite(corners).all(axis=1)
        & (corners[:, :2] >= -sizes).all(axis=1)
        & (corners[:, 2:] <= 2 * sizes).all(axis=1)
    )


def usable_mask(mask: Any, width: float, height: float) -> list | dict:
    """What can be drawn of a segmentation: polygons of at least 3 points that do
    not lie far outside of the image (pycocotools crashes on some), a run-length
    encoding of the image's size; an empty list, if nothing.

    Args:
        mask: As in COCO's ``segmentation``, or None.
        width, height: Of the image, in pixels.
    """
    if isinstance(mask, dict):
        return mask if _is_encoding(mask, width, height) else []
    if not isinstance(mask, list):
        return []
    side = max(width, height)
    return [polygon for polygon in mask if _is_polygon(polygon, side)]


def _is_encoding(mask: dict, width: float, height: float) -> bool:
    counts = mask.get('counts')
    try:
        return (
            bool(counts)
            and [*mask['size']] == [height, width]
            and (not isinstance(counts, list) or sum(counts) == width * height)
        )
    except (KeyError, TypeError):  # no size, or no numbers
        return False


def _is_polygon(points: Any, side: float) -> bool:
    try:
        return (
            len(points) >= 6
            and len(points) % 2 == 0
            and min(points) >= -side
            and max(points) <= 2 * side
            and math.isfinite(sum(points))  # min and max miss a NaN
        )
    except TypeError:  # numbers instead of lists, or no numbers
        return False


class CocoFile:
    """The annotations of a file as columns, as MMDetection uses them.

    Args:
        path: Of the file, for messages.
        data: Its content.
    """

    def __init__(self, path: str, data: dict) -> None:
        self.path = path
        self.images = data.get('images', [])
        self.categories = data.get('categories', [])
        self.annotations = [
            item
            for item in data.get('annotations', [])
            if len(item.get('bbox') or ()) == 4 and not item.get('ignore')
        ]
        rows = {image['id']: row for row, image in enumerate(self.images)}
        # (N,); of no image -1, which is the row of NaN below.
        self.rows = np.array(
            [rows.get(item['image_id'], -1) for item in self.annotations], dtype=int
        )
        sizes = [[image.get(key, np.inf) for key in SIDES] for image in self.images]
        self.image_sizes = np.array([*sizes, [np.nan] * 2], dtype=float)
        self.sizes = self.image_sizes[self.rows]  # (N, 2)
        self.boxes = np.array(  # (N, 4) x, y, width, height
            [item['bbox'] for item in self.annotations], dtype=float
        ).reshape(-1, 4)

    def check_categories(self, classes: Sequence[str], used: int) -> None:
        """
        Args:
            classes: The data set's.
            used: Number of the file's categories that it uses.

        Raises:
            DataError: They are not those of the file, in its order.
        """
        names = [item['name'] for item in self.categories]
        unknown = [name for name in classes if name not in names]
        if unknown or used != len(classes):
            raise DataError(
                f'{self.path!r} has {len(names)} categories, {short(names)}, and no '
                f'{short(unknown)}, which metainfo.classes ({len(classes)} names)'
                ' has: give metainfo=dict(classes=...) of this data set the names '
                'of the file, and num_classes of the heads their number'
            )
        # MMDetection numbers the classes in the order of the file.
        if [name for name in names if name in classes] != classes:
            raise DataError(
                f'metainfo.classes={short(classes)} must stand in the order of '
                f'the categories of {self.path!r}, {short(names)}: labels are '
                'numbered in that order, and would be shown under wrong names'
            )
        left_out = [name for name in names if name not in classes]
        if left_out:
            self._say(
                f'annotations of {short(left_out)} are left out, since '
                'metainfo.classes does not have them'
            )

    def check_annotations(self, with_mask: bool, is_test: bool) -> None:
        """Lists, in one warning, what cannot be used.

        Args:
            with_mask: Masks are loaded.
            is_test: They are for an evaluation, which reads the file itself.

        Raises:
            DataError: No annotation is left, half of them lack the masks, or an
                evaluation would fail on one.
        """
        number = len(self.annotations)
        faults = {
            kind: np.flatnonzero(where)
            for kind, where in self._first_faults(with_mask, is_test).items()
            if where.any()
        }
        if not faults:
            return
        listed = '; '.join(
            f'{len(indices)} {kind} ({self._examples(indices)})'
            for kind, indices in faults.items()
        )
        counts = {kind: len(indices) for kind, indices in faults.items()}
        lacking = counts.get(NO_MASK, 0)
        if lacking * 2 > number:
            raise DataError(
                f'{self.path!r}: {lacking} of {number} annotations have no '
                '`segmentation`, and a config that loads masks (Mask R-CNN, '
                'LoadAnnotations with_mask=True) needs them: add them, or train '
                f'on boxes alone, with a config such as {BOX_CONFIG}'
            )
        if is_test and counts.keys() & {NO_MASK, NO_POLYGON, BAD_RLE}:
            raise DataError(
                f'{self.path!r} cannot be evaluated with masks: of {number} '
                f'annotations {listed}: correct them, or load no masks '
                '(LoadAnnotations with_mask=False, metric="bbox")'
            )
        total = sum(counts.values())
        if total - counts.get(SOME_POLYGON, 0) == number and not is_test:
            raise DataError(
                f'{self.path!r} has no annotation that can be used; of {number} are '
                f'{listed}: correct them'
            )
        self._say(
            f'{total} of {number} annotations are faulty, and left out'
            + ' (not by COCO metrics, which read the file)' * is_test
            + f': {listed}',
            logging.WARNING,
        )

    def check_corners(self) -> None:
        """Warns if boxes look like x1, y1, x2, y2."""
        known = np.isfinite(self.boxes).all(axis=1) & (self.rows >= 0)
        if not known.any():
            return
        first, second = self.boxes[known, :2], self.boxes[known, 2:]
        largest = self.sizes[known] + 1  # annotators round
        beyond = (first + second > largest).any(axis=1)
        fits = ((second > first) & (second <= largest)).all(axis=1)
        if fits.mean() >= CORNERS_FIT and beyond.mean() >= CORNERS_BEYOND:
            self._say(
                f'{beyond.mean():.0%} of {len(fits)} boxes end beyond their image, '
                f'and {fits.mean():.0%} would fit as x1, y1, x2, y2, but COCO '
                'format has x, y, width, height: if these are corners, write '
                '[x1, y1, x2 - x1, y2 - y1]',
                logging.WARNING,
            )

    def count_left_out(self, kept: int, filter_cfg: dict) -> None:
        """Says how many images a data set does not use.

        Args:
            kept: Number of those that it uses.
            filter_cfg: The data set's.
        """
        number = len(self.images)
        if kept >= number:
            return
        min_size = filter_cfg.get('min_size', 0)
        small = int((self.image_sizes[:-1].min(axis=1) < min_size).sum())
        self._say(
            f'{number - kept} of {number} images are left out of training: '
            f'{number - kept - small} without a box of the classes, {small} with a '
            f'side below {min_size} pixels (filter_cfg={dict(filter_cfg)})'
        )

    def _first_faults(self, with_mask: bool, is_test: bool) -> dict[str, np.ndarray]:
        """Kinds of faults, and (N,) bool of whose first one it is."""
        start, extent = self.boxes[:, :2], self.boxes[:, 2:]
        ids = {item['id'] for item in self.categories}
        unknown = np.array(
            [item['category_id'] not in ids for item in self.annotations], dtype=bool
        )
        strange = sorted(
            {str(self.annotations[i]['category_id']) for i in np.flatnonzero(unknown)}
        )
        areas = np.array([item.get('area', 1) for item in self.annotations], float)
        with np.errstate(over='ignore', invalid='ignore'):
            end = start + extent
            overlap = np.minimum(end, self.sizes) - np.maximum(start, 0)
        faults = {
            'of an image_id that no image has': self.rows < 0,
            f'of a category_id that no category has, {short(strange)}': unknown,
            'whose bbox is not finite': ~np.isfinite(self.boxes).all(axis=1),
            'with a width or height below 1 pixel': (extent < 1).any(axis=1),
            'with an area of 0 or less': areas <= 0,
            'whose bbox is outside of the image': (overlap <= 0).any(axis=1)
            | ~usable_boxes(np.hstack([start, end]), self.sizes),
        }
        if with_mask:
            faults |= self._mask_faults(is_test)
        free = np.ones(len(self.annotations), dtype=bool)
        for kind, where in faults.items():
            faults[kind] = where & free
            free &= ~where
        return faults

    def _mask_faults(self, is_test: bool) -> dict[str, np.ndarray]:
        faults = {kind: np.zeros(len(self.boxes), dtype=bool) for kind in MASK_FAULTS}
        # Two lists: the garbage collector would look at every annotation for pairs.
        widths, heights = self.sizes.T.tolist()
        for index, item in enumerate(self.annotations):
            mask = item.get('segmentation')
            usable = usable_mask(mask, widths[index], heights[index])
            if not mask:
                kind = NO_MASK
            elif usable == mask:
                continue
            elif isinstance(mask, dict):
                kind = BAD_RLE
            # A metric fails on a bad first one.
            elif not usable or (is_test and usable[0] is not mask[0]):
                kind = NO_POLYGON
            else:
                kind = SOME_POLYGON
            faults[kind][index] = True
        return faults

    def _examples(self, indices: np.ndarray) -> str:
        """The first annotations in words."""
        words = []
        for index in indices[:EXAMPLES]:
            item, row = self.annotations[index], self.rows[index]
            where = f'image {item["image_id"]!r}'
            if row >= 0:
                where = repr(self.images[row].get('file_name', where))
            words.append(f'id {item["id"]} of {where}')
        return ', '.join(words) + ', ...' * (len(indices) > EXAMPLES)

    def _say(self, message: str, level: int = logging.INFO) -> None:
        print_log(f'{self.path}: {message}', logger='current', level=level)
