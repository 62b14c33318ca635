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
