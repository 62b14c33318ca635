"""Logs and curves, without which a run goes on where a disk refuses them."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from mmengine.visualization import Visualizer

WRITES = ('add_scalar', 'add_scalars', 'add_image', 'add_datasample')


def tolerate_refusals(visualizer: Visualizer, logger: logging.Logger) -> None:
    """From now on what they cannot write into a file is left out, with one warning;
    the checkpoint hook says how long the run itself can do without the disk."""
    told: list[str] = []

    def tell(error: OSError) -> None:
        if not told:
            told.append(str(error))
            logger.warning(
                f'Logs cannot be written ({error}): training goes on, and the console '
                'has them.'
            )

    def tolerant(write: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(write)
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                tell(error)

        return attempt

    for name in WRITES:
        setattr(visualizer, name, tolerant(getattr(visualizer, name)))
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            # Python's own writes a traceback for each line.
            handler.handleError = lambda record: None  # type: ignore[method-assign]
