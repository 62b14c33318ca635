"""Converts a checkpoint of any family: ``convnext-mm convert``."""

import sys

from convnext_mm.cli import main as run


def main(argv=None) -> int:
    return run(['convert', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    sys.exit(main())
