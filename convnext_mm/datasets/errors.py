"""What can be wrong with data, and how messages show lists."""

import re
from collections.abc import Sequence


class DataError(ValueError):
    """Bad data. The message names the file and what to do.

    See ``docs/troubleshooting.md#data-error``."""

    anchor = 'data-error'

    def __init__(self, message: str) -> None:
        # A worker process sends its whole traceback as the message.
        caught = re.match(r'Caught (\w+) in ', message)
        if caught:
            message = message.rsplit(f'{caught[1]}: ', 1)[-1].strip()
        super().__init__(message)


class UnreadableError(DataError):
    """An image or a class map does not exist or cannot be decoded.

    See ``docs/troubleshooting.md#unreadable-image``.

    Args:
        message: The file, what is wrong, and what to do.
        fault: The first two of them.
    """

    anchor = 'unreadable-image'

    def __init__(self, message: str, fault: str | None = None) -> None:
        super().__init__(message)
        self.fault = fault or message


def short(items: Sequence, number: int = 10) -> str:
    """The first items in brackets."""
    shown = ', '.join(map(str, items[:number]))
    return f'[{shown}, ...]' if len(items) > number else f'[{shown}]'
