"""Annotations on their way to COCO's format: what every source becomes, and the
files that are written of it."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from .errors import DataError, short

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
OTHER_SUFFIXES = ('.avif', '.gif', '.heic', '.heif', '.jfif', '.jp2', '.mpo', '.ppm')
ORIENTATION = 0x0112  # EXIF tag
ON_THEIR_SIDE = (5, 6, 7, 8)
TURNED_WHEN_LOADED = ('JPEG', 'MPO', 'PNG')  # by OpenCV, and so by mmcv
# Beyond the edge of a picture by this share of its side: rounding.
ROUNDING = 0.01
TURNED = 'pictures are turned by their EXIF orientation when loaded'
CUT = 'boxes or polygons are cut off at the edge of their picture'
OTHERS = f'files are none of {", ".join(SUFFIXES)}, and are left out'


class Mistake(ValueError):
    """What is wrong in one place: the file, the line, the value, what is allowed."""


class Labelled(NamedTuple):
    """An object of a picture.

    Attributes:
        label: Its class.
        corners: x1, y1, x2, y2 in pixels, from the picture's upper left corner.
        segmentation: COCO's: polygons, or a run-length encoding.
        area: Of the segmentation, in pixels.
        is_crowd: Neither an example nor a mistake: training and COCO's metrics
            ignore what is found there.
    """

    label: str
    corners: tuple[float, float, float, float]
    segmentation: list | dict | None = None
    area: float | None = None
    is_crowd: bool = False


class Picture(NamedTuple):
    """An image file, its size in pixels as mmcv loads it, and its objects."""

    path: Path
    width: int
    height: int
    objects: list[Labelled]


@dataclass
class Findings:
    """What was found wrong or worth a word.

    Attributes:
        mistakes: A sentence for each, of what is left out.
        notes: Kind to the places where it was met.
    """

    mistakes: list[str] = field(default_factory=list)
    notes: defaultdict[str, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def drop_repeats(self) -> None:
        """A picture of two splits is read twice, and wrong once."""
        for found in (self.mistakes, *self.notes.values()):
            found[:] = dict.fromkeys(found)


@dataclass
class Source:
    """A data set that can be read.

    Attributes:
        kind: Its format.
        classes: In their order; None: those that are met, sorted.
        splits: Name to image files.
        folder: Where it lies, for messages.
        read: What lies in a picture. A :class:`Mistake` leaves the picture out.
    """

    kind: str
    classes: list[str] | None
    splits: dict[str, list[Path]]
    folder: Path
    read: Callable[[Path], Picture]


def size_of(path: Path, findings: Findings) -> tuple[int, int]:
    """Width and height in pixels of a picture as mmcv loads it. Decodes it.

    Raises:
        Mistake: There is none, or it is broken.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = (
                image.format in TURNED_WHEN_LOADED
                and image.getexif().get(ORIENTATION) in ON_THEIR_SIDE
            )
            image.draft('L', (1, 1))  # JPEG: the whole file, few pixels
            image.load()
    except FileNotFoundError:
        raise Mistake(f'{path} does not exist: put it there') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise Mistake(
            f'{path} cannot be read as an image ({error}): replace it'
        ) from None
    if turned:
        findings.notes[TURNED].append(str(path))
        return height, width
    return width, height


def list_images(folder: Path, findings: Findings) -> list[Path]:
    """All image files below a folder, sorted; a note on those of other types."""
    found = sorted(folder.rglob('*'))
    others = [str(path) for path in found if path.suffix.lower() in OTHER_SUFFIXES]
    if others:
        findings.notes[OTHERS] += others
    return [path for path in found if path.suffix.lower() in SUFFIXES]


def read_text(path: Path) -> str:
    """Of a file in UTF-8, without its byte order mark.

    Raises:
        FileNotFoundError: There is none.
        DataError: It cannot be read, or has another encoding.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(
            f'{path} cannot be read ({error.strerror}): replace it'
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f'{path} is no text in UTF-8 ({error.reason} at byte {error.start}): save '
            'it as UTF-8'
        ) from error


def cut(
    points: Iterable[tuple[float, float]],
    size: tuple[int, int],
    place: str,
    findings: Findings,
) -> list[tuple[float, float]]:
    """Points x, y in pixels, moved to the edge where they lie beyond it."""
    width, height = size
    points = list(points)
    inside = [(min(max(x, 0), width), min(max(y, 0), height)) for x, y in points]
    if any(math.dist(a, b) > 1e-3 for a, b in zip(points, inside)):
        findings.notes[CUT].append(place)
    return inside


def check_classes(names: Any, place: str) -> list[str]:
    """
    Raises:
        DataError: They are no distinct, non-empty names.
    """
    if isinstance(names, dict):
        keys = [
            int(key) if isinstance(key, str) and key.isdecimal() else key
            for key in names
        ]
        if sorted(keys, key=str) != sorted(range(len(keys)), key=str):
            raise DataError(
                f'{place}: the keys of names are {short(list(names))}: number the '
                f'classes from 0 to {len(names) - 1}'
            )
        names = [name for _, name in sorted(zip(keys, names.values()))]
    if not isinstance(names, list) or not names:
        raise DataError(f'{place}: names is {names!r}: give a list of class names')
    for name in names:
        if name is None or isinstance(name, bool):
            raise DataError(
                f'{place}: names has {name!r}, as which yaml reads a bare yes, no, on, '
                'off, true, false, null or ~: put the name in quotes'
            )
    names = [str(name).strip() for name in names]
    if '' in names or len(set(names)) < len(names):
        raise DataError(
            f'{place}: the classes {short(names)} must be distinct names, none empty'
        )
    return names


def coco_file(
    pictures: Iterable[tuple[str, Picture]], classes: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """
    Args:
        pictures: With the names that they shall have.
        classes: Category 1 is the first.

    Returns:
        The content of a file in COCO's format. An object without a segmentation
        has no such key.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, picture in pictures:
        image_id = len(images) + 1
        images.append(
            dict(
                id=image_id, file_name=name, width=picture.width, height=picture.height
            )
        )
        for item in picture.objects:
            x1, y1, x2, y2 = item.corners
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotation = dict(
                id=len(annotations) + 1,
                image_id=image_id,
                category_id=classes.index(item.label) + 1,
                bbox=box,
                area=round(box[2] * box[3] if item.area is None else item.area, 3),
                iscrowd=int(item.is_crowd),
            )
            if item.segmentation is not None:
                annotation['segmentation'] = item.segmentation
            annotations.append(annotation)
    return dict(
        images=images,
        annotations=annotations,
        categories=[
            dict(id=index, name=name) for index, name in enumerate(classes, start=1)
        ],
    )


def write_json(content: Any, path: Path) -> None:
    """
    Raises:
        DataError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    except OSError as error:
        raise DataError(
            f'{path} cannot be written ({error.strerror}): name another DST'
        ) from error
