"""Trains the model of a config: ``convnext-mm train``."""

import sys

from convnext_mm.cli import main as run


def main(argv=None) -> int:
    return run(['train', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    sys.exit(main())
