"""Evaluates a checkpoint of a detector or segmentor on its test set."""

import argparse

from convnext_mm.apis.config import add_common_arguments, short_errors
from convnext_mm.apis.test import test


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    add_common_arguments(parser)
    parser.add_argument(
        '--tta',
        action='store_true',
        help='average over scales and flips, as tta_model and tta_pipeline of '
        'the config say',
    )
    parser.add_argument(
        '--out', metavar='FILE.pkl', help='write the predictions here, as a pickle'
    )
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window'
    )
    parser.add_argument(
        '--show-dir', metavar='DIR', help='write pictures of predictions here'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds per shown image'
    )
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='fold and pack the backbone for inference first',
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    with short_errors():
        test(**vars(parse_args(argv)))


if __name__ == '__main__':
    main()
