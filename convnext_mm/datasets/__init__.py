"""The bundled shapes data set: ``python -m convnext_mm.datasets DIR``."""

from .shapes import CLASSES, draw_scene, write_shapes

__all__ = ['CLASSES', 'draw_scene', 'write_shapes']
