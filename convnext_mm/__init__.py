"""ConvNeXt backbones for OpenMMLab detection and segmentation."""

import multiprocessing
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = [
    'AmpOptimWrapper',
    'CheckpointError',
    'ConvNeXt',
    'FullyShard',
    'IsotropicConvNeXt',
    'LayerDecayOptimWrapperConstructor',
    'ModernizedResNet',
    'ReleasedClassifierInit',
    'SimplePyramid',
    '__version__',
    'convert_state_dict',
    'export',
    'infer',
    'load_checkpoint',
]


def _starts_a_command() -> bool:
    """Whether Python is about to run a program of this package. ``-m`` is what it
    has for the program's name while it still looks for the module."""
    program = PurePath((getattr(sys, 'argv', None) or [''])[0]).name
    # Processes that a command starts have its name and are none.
    is_child = multiprocessing.parent_process() is not None
    return program in ('-m', 'convnext-mm') and not is_child


if TYPE_CHECKING or not _starts_a_command():
    from .public import (
        AmpOptimWrapper,
        CheckpointError,
        ConvNeXt,
        FullyShard,
        IsotropicConvNeXt,
        LayerDecayOptimWrapperConstructor,
        ModernizedResNet,
        ReleasedClassifierInit,
        SimplePyramid,
        convert_state_dict,
        export,
        infer,
        load_checkpoint,
    )
else:
    # A command imports this when it needs it: its help, its completion and what
    # it says about a broken environment do not wait for PyTorch.
    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
        from . import public

        return getattr(public, name)
