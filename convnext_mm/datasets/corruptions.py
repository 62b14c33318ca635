"""Common corruptions of images at test time (arXiv 1903.12261, 1907.07484), drawn
anew for each image and the same in every run."""

import contextlib
import difflib
import hashlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from convnext_mm.registry import TRANSFORMS, register

from .data_check import GuardedLoad, leaves
from .errors import DataError
from .imagenet_sets import ALEXNET_ERRORS, SEVERITIES, ImageNetCorrupted

NAMES = tuple(ALEXNET_ERRORS)  # the 15 of ImageNet-C
MIN_SIDE = 32  # pixels, of the imagecorruptions package
# What has a generator of its own in imagecorruptions, and takes a seed for it.
SEEDED = ('impulse_noise', 'glass_blur')


def check_corruption(name: str, severity: int) -> None:
    """
    Raises:
        DataError: There is no such corruption or severity; a close name is given.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(str(name), NAMES, 1)
        raise DataError(
            f'there is no corruption {name!r}'
            + (f': did you mean {close[0]}?' if close else '')
            + f' There are {", ".join(NAMES)}'
        )
    if type(severity) is not int or severity not in SEVERITIES:
        raise DataError(
            f'a severity is a whole number from 1 to {len(SEVERITIES)}, got '
            f'{severity!r}'
        )


@register(TRANSFORMS)
class Corrupt:
    """Corrupts ``img`` as the imagecorruptions package does (arXiv 1907.07484).

    What is random depends on the pixels, the corruption and the severity alone: not
    on workers, order, or where the image lies. NumPy's generator is left as it was.

    Args:
        corruption: One of :data:`NAMES`; None leaves images as they are.
        severity: 1 to 5.

    Raises:
        DataError: There is no such corruption or severity, or the package is not
            installed; for an image: it is smaller than 32 x 32 pixels, or not of
            8 bits and one or three channels.
    """

    def __init__(self, corruption: str | None = None, severity: int = 1) -> None:
        if corruption is not None:
            check_corruption(corruption, severity)
        self.corruption, self.severity = corruption, severity
        try:
            from imagecorruptions import corrupt
        except ImportError as error:
            raise DataError(
                f'corruptions need the imagecorruptions package ({error}): `pip '
                'install imagecorruptions-imaug`'
            ) from error
        self.corrupt = corrupt

    def __call__(self, results: dict) -> dict:
        """
        Args:
            results: ``img``, (H, W, 3) BGR, (H, W, 1) or (H, W), uint8, or float of
                such values, as the loading transforms give it; ``img_path`` for
                messages.

        Returns:
            The same, with an image of the same shape and dtype.
        """
        if self.corruption is None:
            return results
        image = results['img']
        pixels = self._checked(image, results.get('img_path'))
        digest = hashlib.blake2b(
            f'{self.corruption} {self.severity} {pixels.shape}'.encode(), digest_size=4
        )
        digest.update(pixels.tobytes())
        seed = int.from_bytes(digest.digest(), 'big')
        options = dict(seed=seed) if self.corruption in SEEDED else {}
        is_grey = image.ndim == 2 or image.shape[2] == 1
        # Snow, frost and JPEG tell colours apart.
        code = cv2.COLOR_GRAY2RGB if is_grey else cv2.COLOR_BGR2RGB
        with _seeded(seed):
            corrupted = self.corrupt(
                cv2.cvtColor(pixels, code),
                severity=self.severity,
                corruption_name=self.corruption,
                **options,
            )
        code = cv2.COLOR_RGB2GRAY if is_grey else cv2.COLOR_RGB2BGR
        corrupted = cv2.cvtColor(corrupted, code)
        results['img'] = corrupted.reshape(image.shape).astype(image.dtype)
        return results

    def _checked(self, image: np.ndarray, path: str | None) -> np.ndarray:
        """The pixels as uint8."""
        which = repr(path) if path else 'an image'
        shape, dtype = image.shape, image.dtype
        if min(shape[:2]) < MIN_SIDE:
            raise DataError(
                f'{which} has {shape[1]} x {shape[0]} pixels, and {self.corruption} '
                f'needs at least {MIN_SIDE} x {MIN_SIDE}: take it out of the data '
                'set, or enlarge it'
            )
        is_pixels = dtype == np.uint8 or (
            dtype.kind == 'f' and image.min() >= 0 and image.max() <= 255
        )
        if shape[2:] not in ((), (1,), (3,)) or not is_pixels:
            raise DataError(
                f'{which} is loaded as {dtype} of shape {shape}: {self.corruption} '
                'needs one or three channels with values of 0 to 255 '
                "(LoadImageFromFile's color_type='color')"
            )
        return image.astype(np.uint8)

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(corruption={self.corruption!r}, '
            f'severity={self.severity})'
        )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, which imagecorruptions draws from."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


def insert(dataset: Any, corrupt: Corrupt) -> None:
    """Puts a transform behind the one that loads the image.

    Args:
        dataset: As :func:`.data_check.check_dataset` has left it; wrappers are looked
            into.
        corrupt: What to put there.

    Raises:
        DataError: A pipeline loads no image, or the images are corrupted already.
    """
    for leaf in leaves(dataset):
        if isinstance(leaf, ImageNetCorrupted):
            raise DataError(
                f'the images of {leaf.data_root!r} are corrupted already: name a data '
                'set of clean ones, or leave --corruptions out'
            )
        transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', [])
        places = [
            index
            for index, transform in enumerate(transforms)
            if isinstance(transform, GuardedLoad) and transform.loads_image
        ]
        if not places:
            raise DataError(
                f'the pipeline of {type(leaf).__name__} has no transform that loads '
                'an image (Load...Image...), behind which to corrupt it: '
                f'{[type(t).__name__ for t in transforms]}'
            )
        transforms.insert(places[0] + 1, corrupt)
