"""The networks, and what of them MMDetection and MMPretrain build."""

from convnext_mm.registry import MODELS, register_on_demand

from .backbone import StagedBackbone
from .classifier_init import ReleasedClassifierInit
from .convnext import ConvNeXt
from .isotropic import IsotropicConvNeXt
from .modernized_resnet import ModernizedResNet
from .pyramid import SimplePyramid

__all__ = [
    'ConvNeXt',
    'IsotropicConvNeXt',
    'ModernizedResNet',
    'ReleasedClassifierInit',
    'SimplePyramid',
    'StagedBackbone',
]

register_on_demand(MODELS, 'SingleRoIExtractor', 'convnext_mm.models.roi_extractor')
