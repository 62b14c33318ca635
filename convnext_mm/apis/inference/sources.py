"""What a user names: files, folders, patterns, addresses, videos, cameras, standard
input; and the pictures in them, one after the other."""

import contextlib
import difflib
import glob
import io
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np
from PIL import Image

from convnext_mm.checkpoint import CheckpointDownloadError
from convnext_mm.checkpoint.errors import shown
from convnext_mm.checkpoint.remote import open_url
from convnext_mm.datasets.errors import DataError

from .decode import check_size, decode

PICTURES = (
    '.avif .bmp .gif .heic .jfif .jp2 .jpeg .jpg .pbm .pgm .png .ppm .tga .tif .tiff '
    '.webp'
).split()
VIDEOS = '.avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv'.split()
MAX_DOWNLOAD = 1 << 30
MAX_NAME = 80  # characters, of which some take four bytes
CAMERA = re.compile(r'camera(?::(\d+))?')


@dataclass(frozen=True)
class Video:
    """A video or camera that a picture is a frame of."""

    name: str
    fps: float


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: For output files, without a suffix: unique in a run.
        file: What the user calls it.
        image: (H, W, 3) uint8, blue first.
        size: Width and height before it was shrunk.
        note: What was changed, where something was.
        frame: Its number in ``video``, from 0.
        video: What it is a frame of.
    """

    name: str
    file: str
    image: np.ndarray
    size: tuple[int, int]
    note: str | None = None
    frame: int | None = None
    video: Video | None = None


@dataclass(frozen=True)
class Entry:
    """A file, address or device to read, before it is read.

    Args:
        kind: ``'picture'``, ``'video'``, ``'camera'``, ``'address'``, ``'bytes'`` or
            ``'array'``.
        place: Its path, address or number.
        name: As :attr:`Picture.name`.
        data: Its content, of the last two.
    """

    kind: str
    place: str
    name: str
    data: Any = None


def entries(sources: Sequence[Any], exclude: Sequence[Path] = ()) -> list[Entry]:
    """What there is to read.

    Args:
        sources: Paths, patterns (``*``, ``?``, ``[...]``, ``**``), addresses,
            ``camera``, ``camera:1``, ``-`` (standard input: a picture, or paths one
            per line); or arrays, (H, W, 3) uint8, blue first.
        exclude: Folders of outputs, which may be below one of the sources.

    Raises:
        DataError: One names nothing; says what is near.
    """
    found: list[Entry] = []
    outputs = [folder.resolve() for folder in exclude]
    for source in sources:
        if isinstance(source, np.ndarray):
            found.append(Entry('array', 'an array', 'array', source))
        elif isinstance(source, (str, os.PathLike)):
            found += _entries_of(os.fsdecode(source), outputs)
        else:
            raise DataError(
                'a source is a path, an address or an array (H, W, 3) of uint8, got '
                f'{type(source).__name__}'
            )
    if not found:
        raise DataError('no source is given: name files, folders, addresses or videos')
    return _with_own_names(_once(found))


def _once(found: Sequence[Entry]) -> list[Entry]:
    """A file that several sources name is read once."""
    seen: set[str] = set()
    result = []
    for entry in found:
        is_file = entry.kind in ('picture', 'video')
        place = os.path.realpath(entry.place) if is_file else entry.place
        if not is_file or place not in seen:
            seen.add(place)
            result.append(entry)
    return result


def _entries_of(source: str, exclude: Sequence[Path]) -> list[Entry]:
    if source == '-':
        return _standard_input(exclude)
    camera = CAMERA.fullmatch(source)
    if camera and not os.path.exists(source):
        number = camera[1] or '0'
        return [Entry('camera', number, f'camera{number}')]
    if re.match(r'https?://', source, re.IGNORECASE):
        scheme, _, rest = source.partition('://')
        try:
            name = Path(unquote(urlsplit(source).path).replace('\0', '')).stem
        except ValueError as error:
            raise DataError(f'{shown(source)} is no address: {error}') from None
        return [Entry('address', f'{scheme.lower()}://{rest}', name or 'picture')]
    if '\0' in source:
        raise DataError(f'{shown(source)} is no path: it has a NUL in it')
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, exclude)
    if path.exists():
        return [_file(path, path.stem)]
    if glob.has_magic(source):
        matches = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
        files = [p for p in matches if p.is_file() and _is_input(p, exclude)]
        if not files:
            raise DataError(
                f'no picture or video matches {shown(source)}'
                + (f' ({len(matches)} other files do)' if matches else '')
            )
        return [_file(p, p.stem) for p in files]
    raise DataError(f'{shown(source)} does not exist{_near(path)}')


def _near(path: Path) -> str:
    with contextlib.suppress(OSError):
        names = os.listdir(path.parent)
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
        if close:
            close = [shown(path.parent / name) for name in close]
            return f': did you mean {" or ".join(close)}?'
        return ''
    return f', nor does the folder {shown(path.parent)}'


def _is_input(path: Path, exclude: Sequence[Path]) -> bool:
    """Also what has a suffix in capitals; not what is hidden."""
    return (
        path.suffix.lower() in (*PICTURES, *VIDEOS)
        and not path.name.startswith('.')
        and not (exclude and set(exclude) & set(path.resolve().parents))
    )


def _folder(folder: Path, exclude: Sequence[Path]) -> list[Entry]:
    try:
        everything = sorted(_files_below(folder))
    except OSError as error:
        raise DataError(f'{shown(folder)} cannot be read: {error.strerror}') from None
    files = [p for p in everything if _is_input(p, exclude)]
    if not files:
        kinds = sorted({p.suffix or p.name for p in everything})[:5]
        raise DataError(
            f'{shown(folder)} holds no picture or video'
            + (f', only {shown(", ".join(kinds))}' if kinds else ': it is empty')
        )
    return [_file(p, str(p.relative_to(folder).with_suffix(''))) for p in files]


def _files_below(folder: Path) -> Iterator[Path]:
    """Also behind links to folders, each folder once; without hidden folders."""
    seen = set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = [name for name in names if not name.startswith('.')]
        yield from (Path(place, name) for name in files)


def _file(path: Path, name: str) -> Entry:
    kind = 'video' if path.suffix.lower() in VIDEOS else 'picture'
    return Entry(kind, str(path), name)


def _standard_input(exclude: Sequence[Path]) -> list[Entry]:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError('nothing comes on standard input: `cat photo.jpg | ... -`')
    data = sys.stdin.buffer.read()
    if not data.strip():
        raise DataError('standard input is empty')
    try:
        lines = re.split(r'[\r\n\0]+', data.decode('utf-8-sig'))
    except UnicodeDecodeError:
        lines = []
    if not lines or _is_picture(data):
        return [Entry('bytes', 'standard input', 'stdin', data)]
    return [e for line in lines if line.strip() for e in _entries_of(line, exclude)]


def _is_picture(data: bytes) -> bool:
    """Also one whose bytes are text, such as a PPM of numbers."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)):
        return True
    return False


def _with_own_names(found: list[Entry]) -> list[Entry]:
    """Two files of one name would overwrite each other's results."""
    taken: set[str] = set()
    folders: set[str] = set()  # of names; a video's frames are in one of its own
    numbers: Counter[str] = Counter()
    names: dict[int, str] = {}
    for index in sorted(range(len(found)), key=lambda i: found[i].kind == 'video'):
        # No name leads out of the output folder, or is longer than a disk takes.
        parts = [part[-MAX_NAME:].strip() for part in Path(found[index].name).parts]
        base = '/'.join(p for p in parts if p not in ('', '/', '.', '..')) or '_'
        name = base
        is_video = found[index].kind == 'video'
        while name.lower() in taken or (is_video and name.lower() in folders):
            numbers[base] += 1
            name = f'{base}_{numbers[base] + 1}'
        taken.add(name.lower())
        folders.update(str(p).lower() for p in Path(name).parents)
        names[index] = name
    return [replace(entry, name=names[i]) for i, entry in enumerate(found)]


def count(found: Sequence[Entry], every: int = 1) -> int | None:
    """How many pictures there are; None where it is not known."""
    total = 0
    for entry in found:
        if entry.kind == 'camera':
            return None
        frames = 1
        if entry.kind == 'video':
            capture = cv2.VideoCapture(entry.place)
            frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            capture.release()
            if frames < 0:
                return None
        total += -(-frames // every)
    return total


def read(
    found: Sequence[Entry], max_pixels: int, every: int = 1
) -> Iterator[Picture | DataError]:
    """The pictures; in the place of one that cannot be used, why.

    Args:
        found: Of :func:`entries`.
        max_pixels: Larger ones are shrunk to so many.
        every: Of videos and cameras only each so many-th frame.
    """
    for entry in found:
        try:
            if entry.kind in ('video', 'camera'):
                yield from _frames(entry, entry.place, max_pixels, every)
            elif entry.kind == 'address':
                yield from _from_address(entry, max_pixels, every)
            elif entry.kind == 'array':
                yield _shrunk(_from_array(entry), max_pixels)
            else:
                data = entry.data or _bytes_of(entry.place)
                yield _picture(entry, data, max_pixels)
        except DataError as error:
            yield error


def _bytes_of(place: str) -> bytes:
    path = Path(place)
    if not path.is_file():
        raise DataError(f'{shown(place)} is no regular file, or was deleted')
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f'{shown(place)} cannot be read: {error.strerror}') from None


def _from_array(entry: Entry) -> Picture:
    image = entry.data
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            'an array must be (H, W, 3) of uint8, blue first (as cv2.imread gives); '
            f'got {image.shape} of {image.dtype}'
        )
    check_size(image.shape[1::-1], entry.place)
    return Picture(entry.name, entry.place, image, image.shape[1::-1])


def _picture(entry: Entry, data: bytes, max_pixels: int) -> Picture:
    image, note = decode(data, entry.place)
    return _shrunk(
        Picture(entry.name, entry.place, image, image.shape[1::-1], note), max_pixels
    )


def _shrunk(picture: Picture, max_pixels: int) -> Picture:
    height, width = picture.image.shape[:2]
    if width * height <= max_pixels:
        return picture
    scale = (max_pixels / (width * height)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    image = cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA)
    note = f'more than {max_pixels // 1_000_000} megapixels: shrunk for the model'
    note = f'{picture.note}; {note}' if picture.note else note
    return replace(picture, image=image, size=(width, height), note=note)


def _from_address(
    entry: Entry, max_pixels: int, every: int
) -> Iterator[Picture | DataError]:
    address = shown(entry.place)
    try:
        with open_url(entry.place) as answer:
            data = answer.read(MAX_DOWNLOAD + 1)
    except CheckpointDownloadError as error:
        raise DataError(f'{address}: {error}') from None
    except Exception as error:
        raise DataError(f'{address}: the download stopped ({shown(error)})') from None
    if len(data) > MAX_DOWNLOAD:
        raise DataError(
            f'{address} is larger than {MAX_DOWNLOAD >> 30} GiB: fetch it yourself and '
            'give its path'
        )
    if Path(urlsplit(entry.place).path).suffix.lower() not in VIDEOS:
        yield _picture(entry, data, max_pixels)
        return
    with tempfile.NamedTemporaryFile(
        suffix=Path(urlsplit(entry.place).path).suffix
    ) as file:
        file.write(data)
        file.flush()
        yield from _frames(entry, file.name, max_pixels, every)


def _frames(
    entry: Entry, place: str, max_pixels: int, every: int
) -> Iterator[Picture | DataError]:
    """Each frame is a picture; at the end of a video that was cut off, why."""
    is_camera = entry.kind == 'camera'
    what = f'camera {place}' if is_camera else shown(entry.place)
    if not is_camera and not os.path.isfile(place):
        raise DataError(f'{what} is no regular file, or was deleted')
    if not is_camera:
        _check_playlist(place, what)
    capture = cv2.VideoCapture(int(place) if is_camera else place)
    try:
        if not capture.isOpened():
            raise DataError(
                f'{what} does not open: no such device, or another program has it'
                if is_camera
                else f'{what} is no video that OpenCV can read, or is damaged'
            )
        expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = capture.get(cv2.CAP_PROP_FPS)
        # Devices and damaged files give 0, NaN or a million.
        fps = fps if 1 <= fps <= 240 else 25.0
        video = Video(entry.name, max(1.0, fps / every))
        number = 0
        while True:
            is_there, image = capture.read()
            if not is_there:
                break
            if number % every == 0:
                picture = Picture(
                    f'{entry.name}/{number:06d}',
                    entry.place,
                    image,
                    image.shape[1::-1],
                    None,
                    number,
                    video,
                )
                yield _shrunk(picture, max_pixels)
            number += 1
        # What containers say of their length is often a frame or two off.
        if not is_camera and number < min(expected - 2, 0.99 * expected):
            raise DataError(
                f'{what} ends after {number} of {expected} frames: the file is damaged '
                'or cut off'
            )
        if is_camera or not number:
            raise DataError(
                f'{what} gives no {"more pictures" if number else "picture"}'
            )
    finally:
        capture.release()


def _check_playlist(place: str, what: str) -> None:
    """OpenCV would open the files that one names, whatever its own name is."""
    with open(place, 'rb') as file:
        start = file.read(64).lstrip(b'\xef\xbb\xbf \t\r\n').lower()
    if start.startswith((b'#extm3u', b'ffconcat', b'<?xml', b'<mpd')):
        raise DataError(f'{what} is a playlist, no video: name the videos themselves')
