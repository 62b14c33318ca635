"""For programs with this folder in PYTHONPATH: Triton's interpreter is quick."""

import os
import sys
from pathlib import Path

if os.environ.get('TRITON_INTERPRET') == '1':
    sys.path.append(str(Path(__file__).parent.parent))
    import speed

    speed.quick_interpreter()
