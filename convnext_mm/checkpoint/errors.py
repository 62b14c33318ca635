"""What can go wrong with a checkpoint, one class for each thing to do."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why and what to do."""


class CheckpointFileError(CheckpointError):
    """The file is missing, unreadable, damaged or not a checkpoint."""


class UnsafeCheckpointError(CheckpointError):
    """The file is a pickle that asks for more than tensors and plain data."""


class UnknownCheckpointError(CheckpointError):
    """No ConvNeXt was recognised in the checkpoint, or more than one."""


class CheckpointMismatchError(CheckpointError):
    """The ConvNeXt in the checkpoint is incomplete or does not fit the model.
    """


class CheckpointDownloadError(CheckpointError):
    """A remote checkpoint could not be fetched."""


def shown(text: object, limit: int = 200) -> str:
    """A name or path from outside, as a message may hold it: what could move a
    terminal's cursor or forge a line is escaped, the rest cut at ``limit``."""
    text = ''.join(
        c if c.isprintable() else c.encode('unicode_escape').decode('ascii')
        for c in str(text)[:limit + 1])
    return text if len(text) <= limit else f'{text[:limit]}...'
