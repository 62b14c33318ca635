"""Bytes of a picture to pixels, whatever kind of picture they are."""

import contextlib
import io
import struct
from collections.abc import Iterator

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from convnext_mm.checkpoint.errors import shown
from convnext_mm.datasets.errors import DataError

MAX_PIXELS = 500_000_000  # 1.5 GB once decoded
MAX_RATIO = 100  # of the sides: a resized picture keeps at least one row
ORIENTATION = 0x0112  # in EXIF data
# What the training pipelines decode, and OpenCV as they do: 8 bits, without
# transparency. 16 bits lose the lower 8, as there.
AS_IN_TRAINING = {
    'JPEG': ('L', 'RGB'),
    'MPO': ('RGB',),  # two JPEGs of a stereo camera
    'PNG': ('1', 'L', 'P', 'RGB', 'I;16', 'I;16B', 'I'),
    'BMP': ('L', 'P', 'RGB'),
    'TIFF': ('1', 'L', 'P', 'RGB', 'I;16', 'I;16B', 'I;16L'),
    'WEBP': ('RGB',),
    'PPM': ('L', 'RGB', 'I'),
}


def decode(data: bytes, name: str) -> tuple[np.ndarray, str | None]:
    """A picture, turned as its EXIF data say.

    Args:
        data: Content of a file.
        name: For messages.

    Returns:
        (H, W, 3) uint8, blue first, as OpenMMLab's pipelines have it; and a word
        on what was changed, where something was.

    Raises:
        DataError: It is no picture, or cannot be used as one.
    """
    name = shown(name)
    if not data:
        raise DataError(f'{name} is empty')
    try:
        with _any_size(), Image.open(io.BytesIO(data)) as image:
            check_size(image.size, name)
            image.load()
            return _pixels(image, data, name)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f'{name} is no picture{_what_it_is(data)}') from None
    except MemoryError:
        raise DataError(f'{name}: not enough memory to decode it') from None
    # What Pillow's readers raise is many things: OSError, SyntaxError, ...
    except Exception as error:
        raise DataError(
            f'{name} is damaged or cut off ({shown(error, 100)}): bring it anew'
        ) from None


@contextlib.contextmanager
def _any_size() -> Iterator[None]:
    """Pillow's own limit is lower than ours, and is everybody's."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def check_size(size: tuple[int, int], name: str) -> None:
    """
    Raises:
        DataError: No model takes a picture of this width and height.
    """
    width, height = size
    if not min(size):
        raise DataError(f'{name} is {width} x {height} pixels: it is empty')
    if width * height > MAX_PIXELS:
        raise DataError(
            f'{name} is {width} x {height} pixels, and {MAX_PIXELS // 1_000_000} '
            'megapixels are allowed: cut it into pieces'
        )
    if max(size) > MAX_RATIO * min(size):
        raise DataError(
            f'{name} is {width} x {height} pixels: a side that is more than '
            f'{MAX_RATIO} times the other cannot be resized for a model'
        )


def _pixels(
    image: Image.Image, data: bytes, name: str
) -> tuple[np.ndarray, str | None]:
    if image.mode in AS_IN_TRAINING.get(image.format or '', ()) and not (
        'transparency' in image.info
        or getattr(image, 'n_frames', 1) > 1
        # OpenCV turns all others.
        or (image.format == 'WEBP' and image.getexif().get(ORIENTATION, 1) != 1)
    ):
        flat = np.frombuffer(data, np.uint8)
        decoded = cv2.imdecode(flat, cv2.IMREAD_COLOR)
        if decoded is not None and decoded.dtype == np.uint8:
            note = '16 bits were cut to 8' if image.mode.startswith('I') else None
            return decoded, note
    if image.mode == 'F' or image.mode.startswith('I'):
        raise DataError(
            f'{name} has {image.mode} pixels of {image.format}, whose range nobody '
            'knows: save it with 8 bits'
        )
    note = None
    frames = getattr(image, 'n_frames', 1)
    if frames > 1 and image.format != 'MPO':
        image.seek(0)
        note = f'of {frames} frames or pages the first is taken'
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
        note = note or 'what is transparent is white'
    elif image.mode == 'CMYK':
        note = 'CMYK was converted to RGB without a colour profile'
    return np.asarray(image.convert('RGB'))[:, :, ::-1].copy(), note


def _what_it_is(data: bytes) -> str:
    """What else the first bytes stand for."""
    known = {
        b'%pdf': 'a PDF: save its pages as pictures',
        b'<svg': 'an SVG drawing: save it as PNG',
        b'<?xm': 'XML: save an SVG drawing as PNG',
        b'<!do': 'a web page: the address of the picture itself is needed',
        b'<htm': 'a web page: the address of the picture itself is needed',
        b'vers': 'a pointer of Git LFS: run `git lfs pull`',
    }
    kind = known.get(data[:4].lower())
    if kind is None and data[4:8] == b'ftyp':
        brand = struct.unpack('4s', data[8:12].ljust(4))[0].decode('ascii', 'replace')
        kind = (
            f'an image of kind {shown(brand)!r}: save it as JPEG'
            if brand in ('heic', 'heix', 'mif1', 'avif')
            else None
        )
    if kind is None:
        with contextlib.suppress(UnicodeDecodeError):
            if data[:200].decode().isprintable():
                kind = 'text'
    return f', but {kind}' if kind else ' that Pillow can read'
