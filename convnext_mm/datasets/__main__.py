"""Writes the shapes data set: ``python -m convnext_mm.datasets DIR``."""

import argparse

from .shapes import CLASSES, write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m convnext_mm.datasets',
        description='Draws the shapes data set ('
        + ', '.join(CLASSES)
        + ') in COCO layout (boxes, polygon masks) and ADE20K layout (class '
        'maps).',
    )
    parser.add_argument('out', metavar='DIR', help='folder to write')
    parser.add_argument('--train', type=int, default=800, help='training images (800)')
    parser.add_argument('--val', type=int, default=100, help='held-out images (100)')
    parser.add_argument(
        '--size', type=int, default=192, help='image side in pixels (192)'
    )
    parser.add_argument('--seed', type=int, default=0, help='seed (0)')
    args = parser.parse_args()
    try:
        write_shapes(args.out, args.train, args.val, args.size, args.seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    main()
