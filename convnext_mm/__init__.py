"""ConvNeXt backbones for OpenMMLab detection and segmentation."""
try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'convnext_mm needs MMEngine, which comes as onedl-mmengine (maintained)'
        ' or mmengine: install one, for example with `pip install '
        'onedl-mmengine`') from error

from . import compat  # noqa: F401
from .backbone import ConvNeXt
from .layer_decay import LayerDecayOptimWrapperConstructor
from .version import __version__

__all__ = ['ConvNeXt', 'LayerDecayOptimWrapperConstructor', '__version__']
