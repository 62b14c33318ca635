"""Reading checkpoints of any ConvNeXt family, safely and completely."""

from .errors import (
    CheckpointDownloadError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    UnknownCheckpointError,
    UnsafeCheckpointError,
)
from .load import check_source, convert_state_dict, load_checkpoint
from .reader import read_checkpoint

__all__ = [
    'CheckpointDownloadError',
    'CheckpointError',
    'CheckpointFileError',
    'CheckpointMismatchError',
    'UnknownCheckpointError',
    'UnsafeCheckpointError',
    'check_source',
    'convert_state_dict',
    'load_checkpoint',
    'read_checkpoint',
]
