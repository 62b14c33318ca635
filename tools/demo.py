"""Trains a demo config and shows what it learned: ``convnext-mm demo``."""

import sys

from convnext_mm.cli import main as run


def main(argv=None) -> int:
    return run(['demo', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    sys.exit(main())
