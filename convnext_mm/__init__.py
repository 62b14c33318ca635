"""ConvNeXt backbones for OpenMMLab detection and segmentation."""
try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'convnext_mm needs MMEngine, which comes as onedl-mmengine (maintained)'
        ' or mmengine: install one, for example with `pip install '
        'onedl-mmengine`') from error

from . import compat  # noqa: F401
from .amp import AmpOptimWrapper
from .backbone import ConvNeXt
from .checkpoint import (CheckpointError, convert_state_dict,
                         load_checkpoint)
from .checkpoint.gate import install as _install_gate
from .classifier_init import ReleasedClassifierInit
from .layer_decay import LayerDecayOptimWrapperConstructor
from .version import __version__

__all__ = [
    'AmpOptimWrapper', 'CheckpointError', 'ConvNeXt',
    'LayerDecayOptimWrapperConstructor', 'ReleasedClassifierInit',
    '__version__', 'convert_state_dict', 'load_checkpoint'
]

_install_gate()
