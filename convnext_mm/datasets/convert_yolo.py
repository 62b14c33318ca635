"""Data sets in the layout of Ultralytics' YOLO.

A yaml file names the classes and the pictures of each split; beside each folder
``images`` lies one ``labels`` with a text file for each picture, of lines ``class cx
cy w h`` or ``class x1 y1 x2 y2 x3 y3 ...``, in shares of the sides of the picture as
its EXIF orientation turns it.
https://docs.ultralytics.com/datasets/detect, .../segment
"""

import math
from pathlib import Path
from typing import Any

import yaml

from .conversion import (
    ROUNDING,
    Findings,
    Labelled,
    Mistake,
    Picture,
    Source,
    check_classes,
    cut,
    list_images,
    read_text,
    size_of,
)
from .errors import DataError, short

SPLITS = ('train', 'val', 'test')
UNLABELLED = 'pictures have no label file, and are kept as pictures without objects'
TWICE = 'lines are there twice, and one is kept'


def find_yaml(source: Path) -> Path | None:
    """The yaml file of a data set; None, if this is none of YOLO's.

    Args:
        source: That file, or its folder.
    """
    if source.suffix in ('.yaml', '.yml'):
        return source
    found = [
        path
        for path in sorted((*source.glob('*.yaml'), *source.glob('*.yml')))
        if 'names' in path.read_text(errors='replace')
    ]
    named = [path for path in found if path.stem in ('data', 'dataset')]
    return next(iter(named or found), None)


def open_yolo(source: Path, findings: Findings) -> Source:
    """
    Args:
        source: The yaml file, or its folder.
        findings: Where mistakes of lines go.

    Raises:
        DataError: The yaml file, or a folder that it names, is missing or wrong.
    """
    path = find_yaml(source)
    if path is None:
        raise DataError(
            f"{source} has no yaml file with names: YOLO's data.yaml has the keys "
            'path, train, val and names'
        )
    content = _read_yaml(path)
    classes = check_classes(content.get('names'), str(path))
    if content.get('nc', len(classes)) != len(classes):
        raise DataError(
            f'{path}: nc is {content["nc"]!r}, but the number of names is '
            f'{len(classes)}: correct one of them'
        )
    if 'kpt_shape' in content:
        raise DataError(
            f'{path} has kpt_shape={content["kpt_shape"]}: labels with keypoints are '
            'not converted; give boxes or polygons'
        )
    splits = {
        split: _pictures(content[split], content, path, findings)
        for split in SPLITS
        if content.get(split)
    }
    if 'train' not in splits:
        raise DataError(f'{path} has no train: name the folder of the pictures')
    everything = [picture for found in splits.values() for picture in found]
    if not any(_label_file(picture).is_file() for picture in everything):
        raise DataError(
            f'none of the pictures ({len(everything)}) has a label file; the first '
            f'would be {_label_file(everything[0])}: put labels/ beside images/, with '
            'the same folders in it'
        )
    reader = _Reader(classes, findings, everything)
    return Source('YOLO', classes, splits, path.parent, reader.read)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except FileNotFoundError:
        raise DataError(f'{path} does not exist') from None
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        place = f'{path}:{mark.line + 1}' if mark else path
        problem = getattr(error, 'problem', None) or str(error).splitlines()[0]
        raise DataError(f'{place} is no yaml ({problem}): correct it') from None
    if not isinstance(content, dict):
        raise DataError(f'{path} has no keys: it needs path, train, val and names')
    return content


def _pictures(
    entries: Any, content: dict[str, Any], path: Path, findings: Findings
) -> list[Path]:
    """Of a split: a folder, a text file that lists pictures, or several."""
    found: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _resolve(str(entry), str(content.get('path') or ''), path)
        if place.is_dir():
            images = list_images(place, findings)
            if not images:
                raise DataError(f'{path}: the folder {place} holds no images')
            found += images
        elif place.suffix != '.txt':
            raise DataError(
                f'{path}: {place} is neither a folder nor a .txt file that lists '
                'pictures: name one of these'
            )
        else:
            found += [
                place.parent / line.strip()
                for line in read_text(place).splitlines()
                if line.strip()
            ]
    if not found:
        raise DataError(f'{path}: {entries!r} lists no images')
    return found


def _resolve(entry: str, root: str, path: Path) -> Path:
    """Where a split lies: relative to ``path:``, or, where that names a folder of
    another machine, to the yaml file."""
    tried = [
        path.parent / root / entry,
        path.parent / entry,
        path.parent / entry.removeprefix('../'),
    ]
    for place in tried:
        if place.exists():
            return place
    raise DataError(
        f'{path}: {entry!r} does not exist, neither as {tried[0]} nor as {tried[1]}: '
        'correct path, train and val'
    )


def _label_file(picture: Path) -> Path:
    parts = list(picture.parent.parts)
    if 'images' in parts:
        parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
    return Path(*parts, f'{picture.stem}.txt')


class _Reader:
    def __init__(
        self, classes: list[str], findings: Findings, pictures: list[Path]
    ) -> None:
        self.classes = classes
        self.findings = findings
        # Of two pictures with one label file the first has it.
        self.owners: dict[Path, Path] = {}
        for picture in pictures:
            self.owners.setdefault(_label_file(picture), picture)

    def read(self, path: Path) -> Picture:
        label_file = _label_file(path)
        if self.owners[label_file] != path:
            raise Mistake(
                f'{path} and {self.owners[label_file]} share the label file '
                f'{label_file}: give one of them another name'
            )
        width, height = size_of(path, self.findings)
        objects = []
        try:
            lines = read_text(label_file).splitlines()
        except FileNotFoundError:
            self.findings.notes[UNLABELLED].append(str(path))
            lines = []
        except DataError as error:
            raise Mistake(str(error)) from None
        seen = set()
        for number, line in enumerate(lines, start=1):
            place = f'{label_file}:{number}'
            if not line.strip():
                continue
            if line in seen:
                self.findings.notes[TWICE].append(place)
                continue
            seen.add(line)
            try:
                objects.append(self._object(line.split(), (width, height), place))
            except Mistake as mistake:
                self.findings.mistakes.append(f'{place}: {mistake}')
        return Picture(path, width, height, objects)

    def _object(self, words: list[str], size: tuple[int, int], place: str) -> Labelled:
        label, *numbers = (_number(word) for word in words)
        if not label.is_integer() or not 0 <= label < len(self.classes):
            raise Mistake(
                f'the class {words[0]} is outside of names, {short(self.classes)}: '
                f'use 0 to {len(self.classes) - 1}'
            )
        if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
            raise Mistake(
                f'{len(numbers)} numbers follow the class: a box has 4, cx cy w h, a '
                'polygon 6 or more, x1 y1 x2 y2 x3 y3 ...'
            )
        for word, number in zip(words[1:], numbers):
            if not -ROUNDING <= number <= 1 + ROUNDING:
                raise Mistake(
                    f"{word} is outside of 0 to 1: give shares of the picture's width "
                    'and height, not pixels'
                )
        name = self.classes[int(label)]
        width, height = size
        if len(numbers) == 4:
            if min(numbers[2:]) <= 0:
                raise Mistake(f'{" ".join(words[3:])}: width and height are above 0')
            x, y, w, h = numbers
            points = [(x - w / 2, y - h / 2), (x + w / 2, y + h / 2)]
        else:
            points = list(zip(numbers[::2], numbers[1::2]))
        points = cut(
            [(x * width, y * height) for x, y in points], size, place, self.findings
        )
        xs, ys = zip(*points)
        corners = (min(xs), min(ys), max(xs), max(ys))
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise Mistake(f'{" ".join(words[1:])} has no area: take the line out')
        if len(numbers) == 4:
            return Labelled(name, corners)
        polygon = [round(value, 3) for point in points for value in point]
        return Labelled(name, corners, [polygon], _area(points))


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise Mistake(f'{word!r} is no number')
    return number


def _area(points: list[tuple[float, float]]) -> float:
    """Of a polygon: the shoelace formula."""
    following = [*points[1:], points[0]]
    return abs(sum(a * d - b * c for (a, b), (c, d) in zip(points, following))) / 2
