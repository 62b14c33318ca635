"""Trains the model of a config: MMDetection's or MMSegmentation's, whichever
the config's default_scope says. On a machine without a GPU it uses the CPU."""
import argparse
import contextlib
import sys

from convnext_mm.checkpoint import check_source
from convnext_mm.launch import (add_common_arguments, build_runner, check_data,
                                fit_to_device, load_config, short_errors)
from convnext_mm.profile_hook import ProfileFinished


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    add_common_arguments(parser)
    parser.add_argument(
        '--amp',
        action='store_true',
        help='train in mixed precision: bfloat16 where device and model allow '
        'it, float16 on other GPUs, fp32 on other CPUs')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by batch size over the config's "
        'auto_scale_lr.base_batch_size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a path, or with "auto", '
        'from the latest one in the work folder')
    parser.add_argument(
        '--profile',
        nargs='?',
        const=3,
        type=int,
        metavar='STEPS',
        help='profile so many steps (3) after some for warm-up, write a trace '
        "and a table of the step's largest costs to WORK_DIR/profile, and stop")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace):
    """The config to train, checked.

    Raises:
        ValueError: A path or setting is wrong; says which and what to do.
    """
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'convnext_mm.AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError(
                '--auto-scale-lr needs auto_scale_lr=dict(enable=False, '
                f'base_batch_size=...) in the config; {args.config} has none')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
        if cfg.load_from:
            check_source(cfg.load_from)
    if args.profile is not None:
        if args.profile < 1:
            raise ValueError('--profile takes a number of steps from 1 on, '
                             f'got {args.profile}')
        hook = dict(type='convnext_mm.StepProfilerHook', steps=args.profile)
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
        # Neither validation nor a checkpoint between the steps.
        cfg.train_cfg.val_interval = sys.maxsize
        cfg.setdefault('default_hooks', {})['checkpoint'] = None
    fit_to_device(cfg)
    check_data(cfg, ['train_dataloader', 'val_dataloader'])
    return cfg


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        cfg = prepare(args)
    except ValueError as error:
        raise SystemExit(f'error: {error}')
    with short_errors(), contextlib.suppress(ProfileFinished):
        build_runner(cfg).train()


if __name__ == '__main__':
    main()
