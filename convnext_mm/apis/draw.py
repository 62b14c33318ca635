"""Pictures of objects and class maps: colours that stay with a class, outlines, and
labels that do not cover each other."""

import colorsys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

SMALLEST = 640  # longer side in pixels: smaller pictures are enlarged, to be read
SMALL_REGION = 0.003  # share of a picture below which a region has no label
Colour = tuple[int, int, int]


def draw_sample(
    image: np.ndarray,
    sample: Any,
    meta: dict[str, Any],
    opacity: float = 0.5,
    with_labels: bool = True,
    threshold: float = 0,
) -> np.ndarray:
    """What a data sample of MMDetection or MMSegmentation holds: ground truth on the
    left, predictions on the right.

    Args:
        image: (H, W, 3) uint8, red first.
        sample: On the CPU, in the pixels of ``image``.
        meta: ``classes`` and ``palette`` of a data set.
        opacity: Of colours over the picture, in [0, 1].
        with_labels: Write names into a class map's regions.
        threshold: Lowest score of a prediction that is drawn.

    Returns:
        (H', W', 3) uint8, red first; each half at least :data:`SMALLEST` on its
        longer side.
    """
    classes = meta.get('classes') or ()
    palette = colours(len(classes), meta.get('palette'))
    halves = []
    for name in ('gt_instances', 'pred_instances'):
        if name in sample:
            found = sample.get(name)
            if 'scores' in found:
                found = found[found.scores >= threshold]
            halves.append(draw_objects(image, found, classes, palette, opacity))
    if not halves:
        for name in ('gt_sem_seg', 'pred_sem_seg'):
            if name in sample:
                class_map = sample.get(name).data[0].numpy()
                halves.append(
                    draw_class_map(
                        image, class_map, classes, palette, opacity, with_labels
                    )
                )
    return np.concatenate(halves or [_enlarged(image)[0]], axis=1)


def colours(count: int, palette: Any = None) -> list[Colour]:
    """A data set's palette; or, where it has none for all classes, colours far from
    each other: hues a golden angle apart in three brightnesses.

    Args:
        count: Of classes.
        palette: Triples, red first; anything else is none.
    """
    if isinstance(palette, (list, tuple)) and len(palette) >= count:
        return [(int(r), int(g), int(b)) for r, g, b in palette[:count]]
    found = []
    for index in range(count):
        hue, kind = index * 0.381966 % 1, index % 3
        rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.65, 0.8)[kind], (0.95, 0.95, 0.65)[kind])
        red, green, blue = (round(255 * value) for value in rgb)
        found.append((red, green, blue))
    return found


def draw_objects(
    image: np.ndarray,
    found: Any,
    classes: Sequence[str],
    palette: Sequence[Colour],
    opacity: float,
) -> np.ndarray:
    """Draws masks, boxes and labels.

    Args:
        image: (H, W, 3) uint8, red first.
        found: With ``bboxes``, ``labels``, and where they are known ``scores`` and
            ``masks``.
        classes: Names.
        palette: Colours of the classes.
        opacity: Of masks, in [0, 1].

    Returns:
        (H', W', 3) uint8, red first; at least :data:`SMALLEST` on its longer side.
    """
    canvas, scale = _enlarged(image)
    labels = np.asarray(found.labels).tolist()
    boxes = np.asarray(found.bboxes, np.float64).reshape(-1, 4) * scale
    scores = np.asarray(found.scores).tolist() if 'scores' in found else None
    # The large ones first: small ones stay visible.
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = np.argsort(-areas).tolist()
    if 'masks' in found:
        masks = np.asarray(getattr(found.masks, 'masks', found.masks))
        for index in order:
            _fill(canvas, masks[index], palette[labels[index]], opacity)
    width = _line_width(canvas)
    for index in order:
        corners = np.rint(boxes[index]).astype(int).tolist()
        colour = tuple(map(int, palette[labels[index]]))
        cv2.rectangle(canvas, corners[:2], corners[2:], colour, width, cv2.LINE_AA)
    texts = [
        classes[label] + (f' {scores[index]:.0%}' if scores else '')
        for index, label in enumerate(labels)
    ]
    # The most certain ones first: they have the best places.
    ranked = sorted(range(len(labels)), key=lambda i: -scores[i] if scores else 0)
    return _with_labels(
        canvas, ((texts[i], boxes[i, :2].tolist(), palette[labels[i]]) for i in ranked)
    )


def draw_class_map(
    image: np.ndarray,
    class_map: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Colour],
    opacity: float,
    with_labels: bool,
) -> np.ndarray:
    """Draws the classes' colours over a picture, with outlines and names.

    Args:
        image: (H, W, 3) uint8, red first.
        class_map: (H, W), indices of ``classes``; others are left as they are.
        classes: Names.
        palette: Their colours.
        opacity: In [0, 1].
        with_labels: Whether regions have names.

    Returns:
        As :func:`draw_objects`.
    """
    canvas, _ = _enlarged(image)
    whole = class_map.size
    labels = []
    for label in np.unique(class_map).tolist():
        if label >= len(classes):
            continue
        mask = (class_map == label).astype(np.uint8)
        _fill(canvas, mask, palette[label], opacity)
        scale = canvas.shape[0] / mask.shape[0]
        count, _, stats, centres = cv2.connectedComponentsWithStats(mask)
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()) if count > 1 else 0
        if with_labels and stats[largest, cv2.CC_STAT_AREA] >= SMALL_REGION * whole:
            place = (centres[largest] * scale).tolist()
            area = int(stats[largest, cv2.CC_STAT_AREA])
            labels.append((area, classes[label], place, palette[label]))
    labels.sort(key=lambda found: -found[0])
    return _with_labels(canvas, (tuple(found[1:]) for found in labels))


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, float]:
    height, width = image.shape[:2]
    scale = max(1, -(-SMALLEST // max(height, width)))
    # A line of pixels stays a line.
    scale = min(scale, 64)
    if scale == 1:
        return image.copy(), 1
    size = width * scale, height * scale
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), scale


def _line_width(canvas: np.ndarray) -> int:
    return max(1, round(max(canvas.shape[:2]) / 500))


def _fill(
    canvas: np.ndarray, mask: np.ndarray, colour: Sequence[int], opacity: float
) -> None:
    """Colours a mask, and its outline darker, in place."""
    size = canvas.shape[1::-1]
    mask = np.asarray(mask, np.uint8)
    if mask.shape[1::-1] != size:
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_LINEAR)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    inside = mask > 0
    rgb = np.array(colour, np.float32)
    canvas[inside] = (1 - opacity) * canvas[inside] + opacity * rgb
    outline = (rgb * 0.75).astype(int).tolist()
    cv2.drawContours(canvas, contours, -1, outline, _line_width(canvas), cv2.LINE_AA)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Matplotlib brings it.
    return ImageFont.truetype(font_manager.findfont('DejaVu Sans'), size)


def _with_labels(
    canvas: np.ndarray, labels: Iterator[tuple[str, list[float], Sequence[int]]]
) -> np.ndarray:
    """Writes names on their colours; what would cover another one moves down, or is
    left out where there is no room."""
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    font = _font(max(11, round(max(canvas.shape[:2]) / 60)))
    taken: list[tuple[float, float, float, float]] = []
    for text, (x, y), colour in labels:
        _, _, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right + 6, bottom + 4
        left = min(max(0, x), max(0, picture.width - width))
        for shift in (-1, 0, 1, 2, 3):  # above the corner first
            top = min(max(0, y + shift * height), max(0, picture.height - height))
            place = left, top, left + width, top + height
            if not any(_overlap(place, other) for other in taken):
                taken.append(place)
                rgb = tuple(map(int, colour))
                draw.rectangle(place, fill=rgb)
                bright = np.dot(rgb, (0.299, 0.587, 0.114)) > 140
                draw.text(
                    (left + 3, top + 2),
                    text,
                    font=font,
                    fill='black' if bright else 'white',
                )
                break
    return np.asarray(picture)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
