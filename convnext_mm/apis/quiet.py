"""Work without what libraries tell their own developers."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from mmengine.logging import MMLogger

# What they warn of where nothing is wrong.
OF_LIBRARIES = ('Failed to search registry', 'default scope')


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The block prints nothing, and logs warnings and errors only."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_for_users)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
        logger.removeFilter(_is_for_users)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in OF_LIBRARIES)
