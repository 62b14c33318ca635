"""Annotations to draw beside what was found."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData

from convnext_mm.checkpoint.errors import shown
from convnext_mm.datasets.errors import DataError

from .sources import Picture

IGNORED = 255  # of class maps


class Objects:
    """Boxes and masks in COCO's format.

    Args:
        path: A json file.
        classes: The model's; its categories must be named as they are.

    Raises:
        DataError: It is no such file, or has none of the classes.
    """

    def __init__(self, path: str, classes: Sequence[str]) -> None:
        from pycocotools.coco import COCO  # MMDetection's, not MMSegmentation's

        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(path)
            categories = {c['name']: c['id'] for c in self.coco.cats.values()}
            self.image_ids = {
                Path(image['file_name']).name: number
                for number, image in self.coco.imgs.items()
            }
        except Exception as error:
            raise DataError(
                f'{shown(path)} is no annotation file in COCO format '
                f'({type(error).__name__}: {shown(error, 100)})'
            ) from None
        missing = [name for name in classes if name not in categories]
        if missing:
            raise DataError(
                f'{shown(path)} has no category {shown(missing[0])!r}, which the model '
                f'finds; it has {shown(", ".join(categories), 200)}'
            )
        self.category_ids = [categories[name] for name in classes]

    def add_to(self, sample: Any, picture: Picture) -> None:
        """Puts ``gt_instances`` into a sample, where the file has its picture."""
        number = self.image_ids.get(Path(picture.file).name)
        if number is None:
            return
        height, width = picture.image.shape[:2]
        scale = np.array([width / picture.size[0], height / picture.size[1]] * 2)
        boxes, labels, masks = [], [], []
        for found in self.coco.imgToAnns[number]:
            if found['category_id'] not in self.category_ids or found.get('iscrowd'):
                continue
            left, top, across, down = found['bbox']
            boxes.append(np.array([left, top, left + across, top + down]) * scale)
            labels.append(self.category_ids.index(found['category_id']))
            if found.get('segmentation'):
                masks.append(
                    cv2.resize(self.coco.annToMask(found), (width, height)) > 0
                )
        truth = InstanceData(
            bboxes=torch.tensor(np.array(boxes).reshape(-1, 4)),
            labels=torch.tensor(labels, dtype=torch.long),
        )
        if masks and len(masks) == len(boxes):
            truth.masks = torch.tensor(np.array(masks))
        sample.gt_instances = truth


class ClassMaps:
    """Class maps in a folder, named as the pictures are.

    Args:
        folder: Of ``.png`` files.
        reduce_zero_label: 0 stands for no class and 1 for the first, as in ADE20K.
        num_classes: The model's.

    Raises:
        DataError: There is no such folder.
    """

    image_ids: dict[str, int] | None = None
    category_ids: list[int] | None = None

    def __init__(self, folder: str, reduce_zero_label: bool, num_classes: int) -> None:
        self.files = {p.stem: p for p in Path(folder).rglob('*.png')}
        self.reduce_zero_label, self.num_classes = reduce_zero_label, num_classes
        if not self.files:
            raise DataError(f'{shown(folder)} holds no class maps (*.png)')

    def add_to(self, sample: Any, picture: Picture) -> None:
        """Puts ``gt_sem_seg`` into a sample, where there is a map for its picture.

        Raises:
            DataError: The map cannot be read, or has classes that the model does
                not know.
        """
        path = self.files.get(Path(picture.file).stem)
        if path is None:
            return
        found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if found is None or found.ndim != 2:
            raise DataError(f'{shown(path)} is no class map: one number for each pixel')
        found = found.astype(np.int64)
        if self.reduce_zero_label:
            found = np.where(found == 0, IGNORED, found - 1)
        unknown = found[(found >= self.num_classes) & (found < IGNORED - 1)]
        if unknown.size and unknown.max() > self.num_classes:
            raise DataError(
                f'{shown(path)} has class {unknown.max()}, and the model has '
                f'{self.num_classes}: are these maps of another data set?'
            )
        size = picture.image.shape[1::-1]
        found = cv2.resize(
            found.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST
        )
        sample.gt_sem_seg = PixelData(data=torch.tensor(found[None]))


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
