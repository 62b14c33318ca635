"""What `import convnext_mm` gives. Importing it registers everything that configs
name, and installs the gate for checkpoints."""

try:
    import mmengine.runner  # noqa: F401
except ModuleNotFoundError as error:
    # MMEngine imports OpenCV, which comes in several packages that overwrite each
    # other, and requires none.
    advice = {
        'mmengine': 'it comes as onedl-mmengine (maintained) or mmengine: install one, '
        'for example with `pip install onedl-mmengine`',
        'cv2': 'MMEngine needs OpenCV: `pip install opencv-python-headless`',
    }
    if error.name not in advice:
        raise
    raise ModuleNotFoundError(
        f'convnext_mm needs {error.name}: {advice[error.name]}', name=error.name
    ) from error

from . import compat  # noqa: F401
from .apis.export import export
from .apis.inference import infer
from .checkpoint import CheckpointError, convert_state_dict, load_checkpoint
from .checkpoint.gate import install as _install_gate
from .datasets import corruptions as _corruptions  # noqa: F401, registers it
from .datasets import imagenet_sets as _imagenet_sets  # noqa: F401, registers them
from .engine import csv_backend as _csv_backend  # noqa: F401, registers it
from .engine import hooks as _hooks  # noqa: F401, registers them
from .engine.optimizers import AmpOptimWrapper, LayerDecayOptimWrapperConstructor
from .engine.sharding import FullyShard
from .models import (
    ConvNeXt,
    IsotropicConvNeXt,
    ModernizedResNet,
    ReleasedClassifierInit,
    SimplePyramid,
)

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
    'convert_state_dict',
    'export',
    'infer',
    'load_checkpoint',
]

_install_gate()
