"""ConvNeXt backbones, or whole detectors and segmentors with them, timed
side by side; and the paper's own comparison again."""

from .bench import BACKBONE_MODES, DTYPES, MODEL_MODES, Settings, run
from .networks import OURS, PEERS
from .paper import BLOCKS, PaperSettings, run_paper

__all__ = [
    'BACKBONE_MODES',
    'BLOCKS',
    'DTYPES',
    'MODEL_MODES',
    'OURS',
    'PEERS',
    'PaperSettings',
    'Settings',
    'run',
    'run_paper',
]
