"""mmcv's operators without a compiler: what they are (:mod:`.operators`), and how
they get into mmcv (``python -m convnext_mm.compat.mmcv_ops``)."""

import sys


def in_use() -> bool:
    """Whether mmcv, as this process has imported it, runs on these operators."""
    return hasattr(sys.modules.get('mmcv._ext'), 'say_once')
