"""What this package changes in others when it is imported, but for the gate of
checkpoints (:mod:`convnext_mm.checkpoint.gate`), which belongs to that room."""

from . import mmengine_config

__all__ = ['mmengine_config']
