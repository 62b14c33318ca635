"""What an examination says."""

from collections.abc import Callable
from typing import Literal, NamedTuple

State = Literal['ok', 'note', 'problem']


class Fix(NamedTuple):
    """Something that changes no versions and deletes nothing of use."""

    text: str
    """A command, or a sentence."""
    run: Callable[[], None]
    """Raises OSError or subprocess.SubprocessError where it does not succeed."""


class Finding(NamedTuple):
    """One line of a report."""

    name: str
    state: State
    message: str
    advice: str = ''
    fix: Fix | None = None


def not_examined(name: str, obstacle: str, message: str = '') -> Finding:
    """Where something else has to be mended first."""
    start = f'{message}; ' if message else ''
    return Finding(name, 'note', f'{start}not examined: {obstacle}')
