"""What a model finds in a picture, in the pixels of the picture as it was given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from .sources import Picture


@dataclass(frozen=True)
class Prediction:
    """What was found in a picture of ``size``.

    Args:
        name: Of its output files, unique in a run.
        file: What it was read from.
        frame: Its number in a video, from 0; None: no video.
        size: Width and height in pixels.
        classes: Names of all classes.
        labels: (N,) int64, indices of ``classes``; of a detector.
        scores: (N,) float32 in [0, 1], highest first; of a detector.
        boxes: (N, 4) float32, left, top, right, bottom in pixels; of a detector.
        masks: N masks, run-length encoded as COCO's; of an instance segmentor.
            ``pycocotools.mask.decode`` gives (H, W) uint8 of 0 and 1.
        class_map: (H, W) uint8, or uint16 where there are more than 256 classes:
            indices of ``classes``; of a semantic segmentor.
    """

    name: str
    file: str
    frame: int | None
    size: tuple[int, int]
    classes: tuple[str, ...] = field(repr=False)
    labels: np.ndarray | None = None
    scores: np.ndarray | None = None
    boxes: np.ndarray | None = None
    masks: list[dict[str, Any]] | None = None
    class_map: np.ndarray | None = None

    def binary_masks(self) -> np.ndarray:
        """``masks`` as (N, H, W) bool; N is 0 where there are none."""
        from pycocotools import mask as coco_mask

        decoded = [coco_mask.decode(mask) > 0 for mask in self.masks or ()]
        return np.array(decoded, bool).reshape(-1, *self.size[::-1])


def to_prediction(picture: Picture, sample: Any, classes: Sequence[str]) -> Prediction:
    """The data sample of MMDetection or MMSegmentation as a prediction.

    Args:
        picture: It is of.
        sample: On the CPU.
        classes: The model's.
    """
    known: dict[str, Any] = dict(
        name=picture.name,
        file=picture.file,
        frame=picture.frame,
        size=picture.size,
        classes=tuple(classes),
    )
    if 'pred_sem_seg' in sample:
        small = sample.pred_sem_seg.data[0].numpy()
        small = small.astype(np.uint8 if len(classes) <= 256 else np.uint16)
        return Prediction(**known, class_map=_resized(small, picture.size))
    found = sample.pred_instances
    height, width = picture.image.shape[:2]
    scale = np.array(
        [picture.size[0] / width, picture.size[1] / height] * 2, np.float32
    )
    masks = None
    if 'masks' in found:
        masks = [_encoded(mask, picture.size) for mask in found.masks.numpy()]
    return Prediction(
        **known,
        labels=found.labels.numpy(),
        scores=found.scores.numpy(),
        boxes=found.bboxes.numpy() * scale,
        masks=masks,
    )


def mask_area(mask: dict[str, Any]) -> float:
    """Pixels of a run-length encoded mask."""
    from pycocotools import mask as coco_mask

    return float(coco_mask.area(mask))


def _resized(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.shape[1::-1] == tuple(size):
        return array
    return cv2.resize(array, size, interpolation=cv2.INTER_NEAREST)


def _encoded(mask: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """With text for bytes, as json has it."""
    from pycocotools import mask as coco_mask  # MMDetection's, not MMSegmentation's

    rle = coco_mask.encode(np.asfortranarray(_resized(mask.astype(np.uint8), size)))
    return dict(size=rle['size'], counts=rle['counts'].decode())
