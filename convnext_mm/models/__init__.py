"""The networks, and what of them MMDetection and MMPretrain build."""

from convnext_mm.registry import MODELS, register_on_demand

from .classifier_init import ReleasedClassifierInit
from .convnext import ConvNeXt

__all__ = ['ConvNeXt', 'ReleasedClassifierInit']

register_on_demand(MODELS, 'SingleRoIExtractor', 'convnext_mm.models.roi_extractor')
