"""Annotations to draw beside what was found."""

import contextlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image

from convnext_mm.checkpoint.errors import shown
from convnext_mm.datasets.errors import DataError

from .sources import Picture

IGNORED = 255  # of class maps


class _Files:
    """Finds a picture's annotations by the end of its path."""

    def __init__(self, paths: Iterable[tuple[Path, Any]]) -> None:
        self.known: dict[str, list[tuple[tuple[str, ...], Any]]] = defaultdict(list)
        for path, value in paths:
            self.known[path.stem].append((path.with_suffix('').parts[::-1], value))
        self.used: dict[Any, str] = {}  # a value to the picture that has it

    def of(self, picture: Picture) -> Any:
        """The value of the file whose path agrees longest; None: there is none.

        Raises:
            DataError: Two agree as long, or another picture has it already.
        """
        own = Path(picture.file).with_suffix('').parts[::-1]
        found = [
            (sum(1 for _ in _common(own, parts)), value)
            for parts, value in self.known.get(own[0] if own else '', ())
        ]
        if not found:
            return None
        longest = max(length for length, _ in found)
        best = [value for length, value in found if length == longest]
        if len(best) > 1:
            raise DataError(
                f'{shown(picture.file)}: {len(best)} files of the ground truth are '
                'called so; name the folder above them as a source'
            )
        other = self.used.setdefault(best[0], picture.file)
        if other != picture.file:
            raise DataError(
                f'{shown(picture.file)} is called in the ground truth as '
                f'{shown(other)} is: name the folder above them as a source'
            )
        return best[0]


def _common(a: Sequence[str], b: Sequence[str]) -> Iterable[str]:
    for one, other in zip(a, b):
        if one != other:
            return
        yield one


class Objects:
    """Boxes and masks in COCO's format.

    Args:
        path: A json file.
        classes: The model's.

    Raises:
        DataError: It is no such file, or has none of the classes.
    """

    def __init__(self, path: str, classes: Sequence[str]) -> None:
        from pycocotools.coco import COCO  # MMDetection's, not MMSegmentation's

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(path)
            categories = {c['name']: c['id'] for c in self.coco.cats.values()}
            self.files = _Files(
                (Path(image['file_name']), number)
                for number, image in self.coco.imgs.items()
            )
        except Exception as error:
            raise DataError(
                f'{shown(path)} is no annotation file in COCO format '
                f'({type(error).__name__}: {shown(error, 100)})'
            ) from None
        if not set(classes) & set(categories):
            raise DataError(
                f'{shown(path)} has none of the categories that the model finds '
                f'({shown(", ".join(classes), 100)}); it has '
                f'{shown(", ".join(categories), 200)}'
            )
        self.paths = [path]
        self.classes = tuple(classes)
        self.names = {number: name for name, number in categories.items()}
        # What the file lacks is numbered after what it has.
        unused = iter(range(max(categories.values()) + 1, 1 << 31))
        self.category_ids = [
            categories[name] if name in categories else next(unused) for name in classes
        ]
        self.next_image_id = max(self.coco.imgs, default=0) + 1

    def image_id(self, picture: Picture) -> int | None:
        """In the file; None: it does not have this picture."""
        return self.files.of(picture)

    def add_to(self, sample: Any, picture: Picture) -> None:
        """Puts ``gt_instances`` into a sample, where the file has its picture.

        Raises:
            DataError: An annotation of the picture cannot be read.
        """
        number = self.image_id(picture)
        if number is None:
            return
        height, width = picture.image.shape[:2]
        scale = np.array([width / picture.size[0], height / picture.size[1]] * 2)
        boxes, labels, masks = [], [], []
        for found in self.coco.imgToAnns[number]:
            name = self.names.get(found.get('category_id'))
            if name not in self.classes or found.get('iscrowd'):
                continue
            try:
                left, top, across, down = map(float, found['bbox'])
                mask = np.zeros((height, width), bool)
                if found.get('segmentation'):
                    whole = self.coco.annToMask(found)
                    mask = cv2.resize(whole, (width, height)) > 0
            except Exception as error:
                raise DataError(
                    f'{shown(picture.file)}: annotation {found.get("id")} of the '
                    f'ground truth cannot be read ({type(error).__name__}: '
                    f'{shown(error, 80)})'
                ) from None
            boxes.append(np.array([left, top, left + across, top + down]) * scale)
            labels.append(self.classes.index(name))
            masks.append(mask)
        truth = InstanceData(
            bboxes=torch.tensor(np.array(boxes).reshape(-1, 4)),
            labels=torch.tensor(labels, dtype=torch.long),
        )
        if masks and np.any(masks):
            truth.masks = torch.tensor(np.array(masks))
        sample.gt_instances = truth


class ClassMaps:
    """Class maps in a folder, named as the pictures are.

    Args:
        folder: Of ``.png`` files; a palette's indices are the classes.
        reduce_zero_label: 0 stands for no class and 1 for the first, as in ADE20K.
        num_classes: The model's.

    Raises:
        DataError: There is no such folder.
    """

    category_ids = None
    next_image_id = 1

    def __init__(self, folder: str, reduce_zero_label: bool, num_classes: int) -> None:
        paths = list(Path(folder).rglob('*.png'))
        if not paths:
            raise DataError(f'{shown(folder)} holds no class maps (*.png)')
        self.paths = list(map(str, paths))
        self.files = _Files((path, path) for path in paths)
        self.reduce_zero_label, self.num_classes = reduce_zero_label, num_classes

    def image_id(self, picture: Picture) -> int | None:
        """Of files that have ids."""
        return None

    def add_to(self, sample: Any, picture: Picture) -> None:
        """Puts ``gt_sem_seg`` into a sample, where there is a map for its picture.

        Raises:
            DataError: The map cannot be read, is of another size, or has classes
                that the model does not know.
        """
        path = self.files.of(picture)
        if path is None:
            return
        try:
            with Image.open(path) as image:
                found = np.asarray(image).astype(np.int64)
        except Exception as error:
            raise DataError(
                f'{shown(path)} cannot be read ({shown(error, 100)})'
            ) from None
        if found.ndim != 2:
            raise DataError(f'{shown(path)} is no class map: one number for each pixel')
        if found.shape[::-1] != tuple(picture.size):
            raise DataError(
                f'{shown(path)} is {found.shape[1]} x {found.shape[0]}, its picture '
                f'{picture.size[0]} x {picture.size[1]}'
            )
        if self.reduce_zero_label:
            found = np.where(np.isin(found, (0, IGNORED)), IGNORED + 1, found) - 1
        unknown = found[(found >= self.num_classes) & (found != IGNORED)]
        if unknown.size:
            raise DataError(
                f'{shown(path)} has class {unknown.max()}, and the model has 0 to '
                f'{self.num_classes - 1}: are these maps of another data set?'
            )
        size = picture.image.shape[1::-1]
        small = cv2.resize(
            found.astype(np.float32), size, interpolation=cv2.INTER_NEAREST
        )
        sample.gt_sem_seg = PixelData(data=torch.tensor(small.astype(np.int64)[None]))


def load(path: str, predictor: Any) -> Objects | ClassMaps:
    """Annotations of the kind that a model finds.

    Args:
        path: A json file for a detector, a folder for a segmentor.
        predictor: The :class:`.predictor.Predictor`.

    Raises:
        DataError: There is nothing of that kind.
    """
    if predictor.scope == 'mmdet':
        if not os.path.isfile(path):
            raise DataError(
                f'{shown(path)} is no file: the ground truth of a detector is a json '
                'file in COCO format'
            )
        return Objects(path, predictor.classes)
    if not os.path.isdir(path):
        raise DataError(
            f'{shown(path)} is no folder: the ground truth of a segmentor is a folder '
            'of class maps (*.png)'
        )
    return ClassMaps(path, predictor.reduce_zero_label, len(predictor.classes))
