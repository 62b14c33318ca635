"""A drawn data set of filled shapes on textured backgrounds.

Small enough to train on with a CPU, and made of what detectors and segmentors
meet: several classes, overlaps, sizes from small to large, clutter of similar
colours. What is drawn depends on the seed alone.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.utils import track_iter_progress

CLASSES = ('circle', 'triangle', 'square', 'star', 'cross')
# Of a class, in OpenCV's units (2 degrees); classes are 36 apart.
HUE_SPREAD = 8
MIN_VISIBLE = 0.4  # share of a shape that others leave uncovered


class Scene(NamedTuple):
    """One drawn image and what is in it, back to front."""

    image: np.ndarray  # (S, S, 3) uint8, BGR
    labels: list[int]  # class indices, one for each instance
    masks: list[np.ndarray]  # (S, S) bool, visible pixels of each instance


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draws two to eight shapes over a textured background.

    Args:
        rng: Source of every choice.
        size: Side of the image in pixels.
    """
    background = _texture(rng, size)
    image = background.copy()
    labels: list[int] = []
    masks: list[np.ndarray] = []
    areas: list[int] = []  # before others covered a part
    for _ in range(rng.integers(2, 9)):
        label = int(rng.integers(len(CLASSES)))
        # Log-uniform: as many small shapes as large ones.
        radius = size * math.exp(rng.uniform(math.log(0.06), math.log(0.25)))
        center = rng.uniform(radius, size - radius, 2)
        outline = _outline(CLASSES[label], center, radius, rng.uniform(0, 2 * math.pi))
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [np.round(outline).astype(np.int32)], 1)
        mask = mask.astype(bool)
        if not all(
            _stays_visible(old, whole, mask) for old, whole in zip(masks, areas)
        ):
            continue
        areas.append(mask.sum())
        masks = [old & ~mask for old in masks] + [mask]
        labels.append(label)
        behind = background[mask].mean(axis=0)
        image[mask] = _fill(rng, label, behind, mask)
    noise = rng.normal(0, 6, image.shape)
    image = np.clip(cv2.GaussianBlur(image, (3, 3), 0) + noise, 0, 255)
    return Scene(image.astype(np.uint8), labels, masks)


def write_shapes(
    out: str, num_train: int = 800, num_val: int = 100, size: int = 192, seed: int = 0
) -> None:
    """Writes the data set in COCO layout and in ADE20K layout.

    ``images/{training,validation}/*.png`` serve both; beside them are
    ``annotations/instances_{training,validation}.json`` (boxes, polygons) and
    ``annotations/{training,validation}/*.png`` (0 is background, class i is
    i + 1).

    Args:
        out: Folder to write, made where needed.
        num_train, num_val: Numbers of images, at least 1.
        size: Side of the images in pixels, at least 64.
        seed: The same seed gives the same files.

    Raises:
        ValueError: A number is too small.
    """
    for name, value, lowest in (
        ('num_train', num_train, 1),
        ('num_val', num_val, 1),
        ('size', size, 64),
    ):
        if value < lowest:
            raise ValueError(f'{name} must be at least {lowest}, got {value}')
    splits = {'training': num_train, 'validation': num_val}
    for index, (split, number) in enumerate(splits.items()):
        rng = np.random.default_rng((seed, index))
        _write_split(Path(out), split, number, size, rng)


def _write_split(
    out: Path, split: str, number: int, size: int, rng: np.random.Generator
) -> None:
    image_dir = out / 'images' / split
    map_dir = out / 'annotations' / split
    image_dir.mkdir(parents=True, exist_ok=True)
    map_dir.mkdir(parents=True, exist_ok=True)
    coco: dict[str, Any] = dict(
        info=dict(description='convnext_mm shapes'),
        categories=[dict(id=i + 1, name=c) for i, c in enumerate(CLASSES)],
        images=[],
        annotations=[],
    )
    print(f'{out}: drawing {number} {split} images')
    for image_id in track_iter_progress(range(number)):
        scene = draw_scene(rng, size)
        name = f'{image_id:05d}.png'
        class_map = np.zeros((size, size), np.uint8)
        for label, mask in zip(scene.labels, scene.masks):
            class_map[mask] = label + 1
            coco['annotations'].append(
                dict(
                    _describe(mask),
                    id=len(coco['annotations']) + 1,
                    image_id=image_id,
                    category_id=label + 1,
                    iscrowd=0,
                )
            )
        cv2.imwrite(str(image_dir / name), scene.image)
        cv2.imwrite(str(map_dir / name), class_map)
        coco['images'].append(
            dict(id=image_id, file_name=name, height=size, width=size)
        )
    path = out / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(coco))


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32: colour noise at three scales."""
    image = np.full((size, size, 3), rng.uniform(60, 200, 3), np.float32)
    for cells, strength in ((4, 20), (16, 12), (size // 4, 6)):
        noise = rng.normal(0, strength, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
    return image


def _fill(
    rng: np.random.Generator, label: int, behind: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """(pixels of the mask, 3): a textured colour that differs from what is behind.

    Classes have typical hues, which overlap: like things in the world, a shape
    is recognised by its outline and, less surely, by its colour.
    """
    color = behind
    while np.abs(color - behind).max() < 80:
        hue = 180 * label / len(CLASSES) + rng.normal(0, HUE_SPREAD)
        hsv = [hue % 180, rng.uniform(120, 255), rng.uniform(100, 255)]
        color = cv2.cvtColor(np.array([[hsv]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
        color = color.astype(np.float64)
    texture = _texture(rng, len(mask))  # around its own colour
    return color + 0.5 * (texture[mask] - texture.mean((0, 1)))


def _outline(name: str, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """(K, 2) corners x, y of a shape inside a circle."""
    if name == 'cross':
        # Corners of a plus sign of arm width 2/5, on two circles.
        half = math.asin(0.2)
        angles = np.array(
            [
                quarter * math.pi / 2 + offset
                for quarter in range(4)
                for offset in (-half, half, math.pi / 4)
            ]
        )
        radii = radius * np.array([1, 1, 0.2 * math.sqrt(2)] * 4)
    elif name == 'star':
        angles = 2 * math.pi * np.arange(10) / 10
        radii = radius * np.array([1, 0.42] * 5)
    else:
        corners = dict(circle=48, triangle=3, square=4)[name]
        angles = 2 * math.pi * np.arange(corners) / corners
        radii = np.full(corners, radius)
    angles = angles + angle
    return center + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _stays_visible(old: np.ndarray, whole: int, cover: np.ndarray) -> bool:
    """Whether enough is left of a shape of ``whole`` pixels whose visible ones
    are ``old``: in one piece without holes, which a polygon can describe."""
    left = old & ~cover
    if left.sum() == old.sum():
        return True
    contours, _hierarchy = cv2.findContours(
        left.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    return left.sum() >= MIN_VISIBLE * whole and len(contours) == 1


def _describe(mask: np.ndarray) -> dict:
    """COCO's box (x, y, width, height), area and polygons of a mask."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    # A contour runs through pixel centres, COCO's polygons along pixel edges:
    # on an enlarged mask the two are close.
    factor = 4
    large = mask.astype(np.uint8).repeat(factor, axis=0).repeat(factor, axis=1)
    contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [((c.reshape(-1) + 0.5) / factor).tolist() for c in contours]
    return dict(bbox=[x, y, width, height], area=int(mask.sum()), segmentation=polygons)
