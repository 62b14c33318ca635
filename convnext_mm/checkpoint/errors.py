"""What can go wrong with a checkpoint, one class for each thing to do, and how
messages name what comes from outside. ``anchor`` is the entry of a class in
``docs/troubleshooting.md``."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Number


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do.

    See ``docs/troubleshooting.md#checkpoint-error``."""

    anchor = 'checkpoint-error'


class CheckpointFileError(CheckpointError):
    """The file is missing, unreadable, damaged or not a checkpoint.

    See ``docs/troubleshooting.md#checkpoint-file``."""

    anchor = 'checkpoint-file'


class UnsafeCheckpointError(CheckpointError):
    """The file is a pickle that asks for more than tensors and plain data.

    See ``docs/troubleshooting.md#unsafe-checkpoint``."""

    anchor = 'unsafe-checkpoint'


class UnknownCheckpointError(CheckpointError):
    """No ConvNeXt was recognised in the checkpoint, or more than one.

    See ``docs/troubleshooting.md#unknown-checkpoint``."""

    anchor = 'unknown-checkpoint'


class CheckpointMismatchError(CheckpointError):
    """The checkpoint's ConvNeXt is incomplete or does not fit the model.

    See ``docs/troubleshooting.md#checkpoint-mismatch``."""

    anchor = 'checkpoint-mismatch'


class NoWeightsError(CheckpointMismatchError):
    """A model is loaded, and there is nothing for the ConvNeXt in it.

    See ``docs/troubleshooting.md#no-weights``."""

    anchor = 'no-weights'


class CheckpointDownloadError(CheckpointError):
    """A remote checkpoint could not be fetched.

    See ``docs/troubleshooting.md#checkpoint-download``."""

    anchor = 'checkpoint-download'


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written.

    See ``docs/troubleshooting.md#checkpoint-write``."""

    anchor = 'checkpoint-write'


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Puts the name of a checkpoint before the message of an error about it."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f'{shown(source)}: {error}') from error


def shown(value: object, limit: int = 200) -> str:
    """A name, path, number or error from outside, as a message may hold it:
    what could move a terminal's cursor or forge a line is escaped, the rest cut
    at ``limit``; of other values only the type, as they may be without end."""
    is_short = (
        isinstance(value, (list, tuple))
        and len(value) <= 4
        and all(isinstance(item, Number) for item in value)
    )
    if not (
        is_short
        or value is None
        or isinstance(value, (str, os.PathLike, Number, Exception))
    ):
        value = f'a {type(value).__name__}'
    text = ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode('ascii')
        for c in str(value)[: limit + 1]
    )
    return text if len(text) <= limit else f'{text[:limit]}...'


def quoted(prefix: str) -> str:
    """A prefix from a file, as a message may hold it."""
    return f"'{shown(prefix)}'"


def summarise(names: Sequence[str], limit: int = 3) -> str:
    """A few of many names from a file, as a message may hold them."""
    text = ', '.join(shown(name, 100) for name in names[:limit])
    return text if len(names) <= limit else f'{text}, ... ({len(names)} in all)'
