"""Trains the model of a config: MMDetection's or MMSegmentation's, whichever
the config's default_scope says. On a machine without a GPU it uses the CPU."""

import argparse

from convnext_mm.apis.config import add_common_arguments, short_errors
from convnext_mm.apis.train import train


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    add_common_arguments(parser)
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train in mixed precision: bfloat16 where device and model allow '
        'it, float16 on other GPUs, fp32 on other CPUs',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by batch size over the config's "
        'auto_scale_lr.base_batch_size',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a path, or with "auto", '
        'from the newest one in the work folder that can be read',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='delete the checkpoints of another run in the work folder (with '
        '--resume CHECKPOINT, the newer ones)',
    )
    parser.add_argument(
        '--profile',
        nargs='?',
        const=3,
        type=int,
        metavar='STEPS',
        help='profile so many steps (3) after some for warm-up, write a trace '
        "and a table of the step's largest costs to WORK_DIR/profile, and stop",
    )
    return parser.parse_args(argv)


def main(argv=None) -> None:
    with short_errors():
        train(**vars(parse_args(argv)))


if __name__ == '__main__':
    main()
