"""What the pictures share."""

import contextlib
import errno
import os
from pathlib import Path

from matplotlib.figure import Figure

from convnext_mm.engine.errors import ConfigError

DPI = 110
GRID = '#dddddd'
COLOURS = ('#c2543d', '#3d6fc2', '#4f9a57', '#8a62b5', '#c99a2e', '#5f6b7a')


def folder(out: str | os.PathLike) -> Path:
    """The folder, made where needed.

    Raises:
        ConfigError: Nothing can be written there.
    """
    path = Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f'pictures cannot be written into {str(path)!r} ({error.strerror}): give '
            'another folder with --out DIR'
        ) from error
    return path


def save(figure: Figure, path: Path, dpi: int = DPI) -> Path:
    """Writes a picture, whole or not at all.

    Raises:
        ConfigError: It cannot be written there.
    """
    folder(path.parent)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        figure.savefig(partial, dpi=dpi, format='png')
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f'{str(path)!r} cannot be written ({error.strerror}): give another folder '
            'with --out DIR'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path
