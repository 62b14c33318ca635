"""ConvNeXt backbones, or whole detectors and segmentors with them, timed
side by side."""

from .bench import BACKBONE_MODES, DTYPES, MODEL_MODES, Settings, run
from .networks import OURS, PEERS

__all__ = [
    'BACKBONE_MODES',
    'DTYPES',
    'MODEL_MODES',
    'OURS',
    'PEERS',
    'Settings',
    'run',
]
