"""``python -m convnext_mm``: the command line."""

import sys

from convnext_mm.cli import main

if __name__ == '__main__':
    sys.exit(main())
