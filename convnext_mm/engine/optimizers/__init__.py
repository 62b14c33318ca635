"""Layer-wise learning-rate decay and mixed precision."""

from .amp import AmpOptimWrapper
from .layer_decay import LayerDecayOptimWrapperConstructor

__all__ = ['AmpOptimWrapper', 'LayerDecayOptimWrapperConstructor']
