"""Trains a demo config on the shapes data set, then shows what it learned:
metrics, predictions beside ground truth and curves. Draws the data first where
it is missing. Ends with status 1 if a required figure is not reached."""

import argparse
import sys

from convnext_mm.apis.config import add_common_arguments, short_errors
from convnext_mm.apis.demo import run_demo


def required_figure(text: str) -> tuple[str, float]:
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not METRIC=NUMBER') from None


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the demo config')
    parser.add_argument(
        '--require',
        nargs='+',
        type=required_figure,
        default=[],
        dest='goals',
        metavar='METRIC=NUMBER',
        help='figures to reach, such as bbox_mAP_50=0.70',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = vars(parse_args(argv))
    with short_errors():
        reached = run_demo(goals=dict(args.pop('goals')), **args)
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
