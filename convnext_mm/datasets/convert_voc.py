"""Data sets in the layout of Pascal VOC.

``Annotations/*.xml`` describe ``JPEGImages/*``, ``ImageSets/Main/{train,val,test}.txt``
list names. http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc: coordinates count
pixels from 1, and xmax and ymax are those of the last pixel inside. Many tools write
such files with coordinates from 0.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .conversion import (
    ROUNDING,
    SUFFIXES,
    TURNED,
    Findings,
    Labelled,
    Mistake,
    Picture,
    Source,
    cut,
    list_images,
    read_text,
    size_of,
)
from .errors import DataError

SPLITS = ('train', 'val', 'test')
CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')
MEMBER = re.compile(r'\s+-?[01]$')  # in the lists of a class: whether it is there
LINE = ' line'  # of an element; no XML attribute begins with a space
BEGINS_AT_ZERO = re.compile(rb'<[xy]min>\s*0(\.0*)?\s*<')
DIFFICULT = 'objects are difficult, and become crowds, which training ignores'
FROM_ZERO = 'coordinates count from 0, not from 1 as in the format'
EMPTY = 'lists have no pictures, and are left out'
NO_MASK = 'objects have no pixel in SegmentationObject, and no mask'


def find_annotations(source: Path) -> Path | None:
    """The folder of a data set's xml files; None, if this is none of VOC's.

    Args:
        source: The folder with ``Annotations``, up to two above it, or one whose xml
            files lie beside the pictures.

    Raises:
        DataError: There are several.
    """
    if not source.is_dir():
        return None
    found = [
        folder
        for pattern in ('Annotations', '*/Annotations', '*/*/Annotations')
        for folder in sorted(source.glob(pattern))
        if folder.is_dir()
    ]
    if len(found) > 1:
        raise DataError(
            f'{source} holds several data sets, {", ".join(map(str, found))}: give the '
            'folder of one'
        )
    if not found and any(source.glob('*.xml')):
        return source
    return found[0] if found else None


def open_voc(
    source: Path,
    findings: Findings,
    masks: bool = False,
    first_pixel: int | None = None,
) -> Source:
    """
    Args:
        source: As :func:`find_annotations` takes it.
        findings: Where mistakes of objects go.
        masks: Take the pictures of ``ImageSets/Segmentation``, and their objects'
            masks from ``SegmentationObject``.
        first_pixel: What coordinates count from, 0 or 1. By default 1, unless one of
            them is 0.

    Raises:
        DataError: There is no such data set, or a file that it needs is missing.
    """
    annotations = find_annotations(source)
    if annotations is None:
        raise DataError(f'{source} has no folder Annotations with xml files')
    root = source if annotations == source else annotations.parent
    folder = root / 'JPEGImages' if (root / 'JPEGImages').is_dir() else root
    images: dict[str, list[Path]] = {}
    for path in list_images(folder, findings):
        images.setdefault(path.stem, []).append(path)
    splits = {
        split: [_image(name, images, folder, findings) for name in names]
        for split, names in _names(root, annotations, masks, findings).items()
    }
    if first_pixel is None:
        zero = _first_from_zero(sorted(annotations.glob('*.xml')))
        first_pixel = 0 if zero else 1
        if zero:
            findings.notes[FROM_ZERO].append(zero)
    mask_folder = root / 'SegmentationObject' if masks else None
    reader = _Reader(annotations, mask_folder, first_pixel, findings)
    return Source('Pascal VOC', None, splits, folder, reader.read)


def _image(
    name: str, images: dict[str, list[Path]], folder: Path, findings: Findings
) -> Path:
    """Of a name in a list, with or without its ending."""
    if name not in images and name.lower().endswith(SUFFIXES):
        name = Path(name).stem
    path, *others = images.get(name, [folder / f'{name}.jpg'])
    for other in others:
        if other.resolve() != path.resolve():
            findings.mistakes.append(
                f'{other} and {path} share the file {name}.xml: give one of them '
                'another name, or delete it'
            )
    return path


def _names(
    root: Path, annotations: Path, masks: bool, findings: Findings
) -> dict[str, list[str]]:
    """Of the pictures of each split."""
    lists = root / 'ImageSets' / ('Segmentation' if masks else 'Main')
    found = {
        split: [
            MEMBER.sub('', line.strip())
            for line in read_text(lists / f'{split}.txt').splitlines()
            if line.strip()
        ]
        for split in (*SPLITS, 'trainval')
        if (lists / f'{split}.txt').is_file()
    }
    for split in [split for split in found if not found[split] and split != 'train']:
        findings.notes[EMPTY].append(str(lists / f'{split}.txt'))
        del found[split]
    together = found.pop('trainval', None)
    if 'train' not in found and together:
        found = {'train': together, **found}
    if masks and not found:
        raise DataError(
            f'{lists} has no train.txt, which lists the pictures that have masks: '
            'convert without --masks'
        )
    found = found or {'train': sorted(path.stem for path in annotations.glob('*.xml'))}
    if not found.get('train'):
        raise DataError(f'{lists} lists no pictures to train on: write train.txt')
    return found


class _Builder(ElementTree.TreeBuilder):
    """Elements that know their line; no DOCTYPE, and so no entities of its own."""

    line = 0

    def start(self, tag: str, attrs: dict[str, str]) -> ElementTree.Element:
        element = super().start(tag, attrs)
        element.set(LINE, str(self.line))
        return element

    def doctype(self, *_: str | None) -> None:
        raise Mistake('it has a DOCTYPE, which no VOC file needs: take that out')


def _parse(path: Path) -> ElementTree.Element:
    builder = _Builder()
    parser = ElementTree.XMLParser(target=builder)
    try:
        for builder.line, line in enumerate(path.read_bytes().splitlines(True), 1):
            parser.feed(line)
        return parser.close()
    except FileNotFoundError:
        raise Mistake(f'{path} does not exist: write it, or list other names') from None
    except ElementTree.ParseError as error:
        raise Mistake(f'{path} is no xml file ({error}): correct it') from None
    except Mistake as mistake:
        raise Mistake(f'{path}:{builder.line}: {mistake}') from None
    except (ValueError, LookupError) as error:  # the encoding that it declares
        raise Mistake(
            f'{path} cannot be read ({error}): save it as UTF-8, with '
            'encoding="utf-8" in its first line'
        ) from None


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or '').strip()


def _number(element: ElementTree.Element, tag: str) -> float:
    text = _text(element, tag)
    try:
        number = float(text)
    except ValueError:
        number = float('nan')
    if not np.isfinite(number):
        raise Mistake(f'{tag} is {text!r}, no number')
    return number


def _first_from_zero(files: Iterable[Path]) -> str | None:
    """The first xml file with a box that begins at 0."""
    for path in files:
        if path.is_file() and BEGINS_AT_ZERO.search(path.read_bytes()):
            return str(path)
    return None


class _Reader:
    def __init__(
        self,
        annotations: Path,
        masks: Path | None,
        first_pixel: int,
        findings: Findings,
    ) -> None:
        self.annotations = annotations
        self.masks = masks
        self.first_pixel = first_pixel
        self.findings = findings

    def read(self, path: Path) -> Picture:
        file = self.annotations / f'{path.stem}.xml'
        root = _parse(file)
        size = size_of(path, self.findings)
        self._check_size(root, file, path, size)
        mask = self._mask(path, size)
        objects = []
        for index, element in enumerate(root.iter('object'), start=1):
            place = f'{file}:{element.get(LINE)}'
            try:
                objects.append(self._object(element, index, size, mask, place))
            except Mistake as mistake:
                self.findings.mistakes.append(f'{place}: {mistake}')
        return Picture(path, *size, objects)

    def _check_size(
        self, root: ElementTree.Element, file: Path, path: Path, size: tuple[int, int]
    ) -> None:
        """That the boxes are those of the picture as it is loaded."""
        element = root.find('size')
        if element is None or not (_text(element, 'width') + _text(element, 'height')):
            return
        place = f'{file}:{element.get(LINE)}'
        try:
            given = (_number(element, 'width'), _number(element, 'height'))
        except Mistake as mistake:
            raise Mistake(f'{place}: {mistake}') from None
        if given in (size, (0, 0)):
            return
        shown = (
            f'size is {given[0]:g} x {given[1]:g}, but {path} has '
            f'{size[0]} x {size[1]} pixels'
        )
        if given == size[::-1] and str(path) in self.findings.notes.get(TURNED, ()):
            raise Mistake(
                f'{place}: {shown} after its EXIF orientation turned it, as every '
                'picture is when loaded: turn the picture itself, or draw its boxes '
                'anew'
            )
        raise Mistake(f'{place}: {shown}: is it the picture that was labelled?')

    def _mask(self, path: Path, size: tuple[int, int]) -> np.ndarray | None:
        """(H, W) uint8, the number of the object at each pixel."""
        if self.masks is None:
            return None
        file = self.masks / f'{path.stem}.png'
        try:
            with Image.open(file) as image:
                mask = np.array(image)
        except OSError as error:
            raise Mistake(f'{file} cannot be read as an image ({error})') from None
        if mask.shape != size[::-1]:
            raise Mistake(
                f'{file} has the shape {mask.shape}: one channel of {size[1]} x '
                f'{size[0]} pixels, height x width, is needed'
            )
        return mask

    def _object(
        self,
        element: ElementTree.Element,
        index: int,
        size: tuple[int, int],
        mask: np.ndarray | None,
        place: str,
    ) -> Labelled:
        name = _text(element, 'name')
        if not name:
            raise Mistake('an object without a name: give its class')
        box = element.find('bndbox')
        if box is None:
            raise Mistake(f'the object {name!r} has no bndbox: add one')
        numbers = [_number(box, tag) for tag in CORNERS]
        shown = ', '.join(f'{tag} {value:g}' for tag, value in zip(CORNERS, numbers))
        if numbers[0] > numbers[2] or numbers[1] > numbers[3]:
            raise Mistake(f'{shown}: the smaller number comes first')
        # Counted from 1 the last pixel is inside.
        first = self.first_pixel
        x1, y1, x2, y2 = numbers[0] - first, numbers[1] - first, *numbers[2:]
        margins = [1 + ROUNDING * side for side in size]
        if (
            min(x1 + margins[0], y1 + margins[1]) < 0
            or x2 > size[0] + margins[0]
            or y2 > size[1] + margins[1]
        ):
            raise Mistake(
                f'{shown}: outside of the picture of {size[0]} x {size[1]} pixels'
            )
        (x1, y1), (x2, y2) = cut([(x1, y1), (x2, y2)], size, place, self.findings)
        if x1 >= x2 or y1 >= y2:
            raise Mistake(f'{shown}: the box has no area: take it out')
        is_crowd = _text(element, 'difficult') == '1'
        if is_crowd:
            self.findings.notes[DIFFICULT].append(place)
        item = Labelled(name, (x1, y1, x2, y2), is_crowd=is_crowd)
        return item if mask is None else self._with_mask(item, mask == index, place)

    def _with_mask(self, item: Labelled, mask: np.ndarray, place: str) -> Labelled:
        from pycocotools.mask import encode

        area = int(mask.sum())
        if not area:
            self.findings.notes[NO_MASK].append(place)
            return item
        encoded = encode(np.asfortranarray(mask.astype(np.uint8)))
        encoded['counts'] = encoded['counts'].decode()
        return item._replace(segmentation=encoded, area=area)
