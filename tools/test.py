"""Evaluates a checkpoint of a detector or segmentor on its test set."""
import argparse

from convnext_mm import ConvNeXt
from convnext_mm.checkpoint import check_source
from convnext_mm.launch import (add_common_arguments, build_runner, check_data,
                                fit_to_device, load_config, short_errors)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    add_common_arguments(parser)
    parser.add_argument(
        '--tta',
        action='store_true',
        help='average over scales and flips, as tta_model and tta_pipeline of '
        'the config say')
    parser.add_argument('--out', metavar='FILE.pkl',
                        help='write the predictions here, as a pickle')
    parser.add_argument(
        '--show', action='store_true', help='show predictions in a window')
    parser.add_argument(
        '--show-dir', metavar='DIR', help='write pictures of predictions here')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds per shown image')
    parser.add_argument(
        '--deploy',
        action='store_true',
        help='fold and pack the backbone for inference first')
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace):
    """The config to test, checked.

    Raises:
        ValueError: A path or setting is wrong; says which and what to do.
    """
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end in .pkl or .pickle, got {args.out}')
    cfg = load_config(args)
    check_source(args.checkpoint)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.tta:
        use_test_time_augmentation(cfg, args.config)
    fit_to_device(cfg)
    check_data(cfg, ['test_dataloader'])
    return cfg


def draw_predictions(cfg, args: argparse.Namespace) -> None:
    """Switches the config's visualization hook on."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError('--show and --show-dir need '
                         'default_hooks.visualization in the config')
    scope = cfg.get('default_scope')
    switch = 'enable' if scope == 'mmpretrain' else 'draw'
    hook.update({switch: True}, show=args.show, wait_time=args.wait_time)
    if args.show_dir and scope == 'mmseg':
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        folder = 'out_dir' if scope == 'mmpretrain' else 'test_out_dir'
        hook[folder] = args.show_dir


def switch_to_deploy(runner) -> None:
    """Loads the checkpoint, then switches every ConvNeXt of the model.

    Raises:
        SystemExit: The model has none.
    """
    backbones = [m for m in runner.model.modules() if isinstance(m, ConvNeXt)]
    if not backbones:
        raise SystemExit('error: --deploy needs a model with a '
                         'convnext_mm.ConvNeXt')
    runner.load_or_resume()
    for backbone in backbones:
        backbone.switch_to_deploy()


def use_test_time_augmentation(cfg, name: str) -> None:
    """Puts the config's ``tta_model`` around its model and ``tta_pipeline``
    into its test set. What ``tta_model.module`` holds is merged into the model
    (the published multi-scale segmentation takes images whole).

    Raises:
        ValueError: The config has no such settings.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if not cfg.get(key)]
    if missing:
        raise ValueError(
            f'--tta needs {" and ".join(missing)} in the config, which {name} '
            'does not have; configs/_base_/datasets/ade20k_512x512.py has an '
            'example for segmentation')
    tta_model = cfg.tta_model
    cfg.merge_from_dict(dict(model=tta_model.pop('module', {})))
    cfg.model = dict(**tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        cfg = prepare(args)
    except ValueError as error:
        raise SystemExit(f'error: {error}')
    runner = build_runner(cfg)
    if args.out:
        if cfg.get('default_scope') == 'mmdet':  # keeps masks compressed
            from mmdet.evaluation import DumpDetResults as DumpResults
        else:
            from mmengine.evaluator import DumpResults
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    with short_errors():
        if args.deploy:
            switch_to_deploy(runner)
        runner.test()


if __name__ == '__main__':
    main()
