"""Evaluation."""

from typing import Any

import click

from .options import Command, complete_model, config_options, gpus_option, launch


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm test mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco
  convnext-mm test my_config.py work_dirs/my_config/iter_40000.pth --gpus 8
  convnext-mm test work_dirs/my_config --show-dir pictures
  convnext-mm test upernet_convnext-b --corruptions all
  convnext-mm test work_dirs/demo --corruptions fog snow --severities 1 3 5
  convnext-mm test convnext-tiny_imagenet-c --data-root data/imagenet-c""",
)
@click.argument('model', shell_complete=complete_model)
@click.argument('checkpoint', required=False)
@config_options
@gpus_option
@click.option(
    '--tta',
    is_flag=True,
    help='Average over scales and flips, as tta_model and tta_pipeline of the config '
    'say.',
)
@click.option(
    '--out', metavar='FILE.pkl', help='Write the predictions here, as a pickle.'
)
@click.option('--show', is_flag=True, help='Show predictions in a window.')
@click.option('--show-dir', metavar='DIR', help='Write pictures of predictions here.')
@click.option(
    '--wait-time',
    type=float,
    default=2,
    show_default=True,
    help='Seconds per shown image.',
)
@click.option(
    '--deploy', is_flag=True, help='Fold and pack the backbone for inference first.'
)
@click.option(
    '--corruptions',
    multiple=True,
    metavar='all|NAME...',
    help='Evaluate on corrupted images as well, 15 kinds or those named '
    '(gaussian_noise, fog, ...); results go to corruptions.json in the work folder, '
    'and a second start does what is missing there.',
)
@click.option(
    '--severities',
    multiple=True,
    type=int,
    metavar='1...5',
    help='Of the corruptions.  [default: 1 2 3 4 5]',
)
@click.pass_context
def command(
    ctx: click.Context,
    /,
    gpus: int | None,
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
    **options: Any,
) -> int:
    """Evaluate MODEL on its test set, and print what was measured beside what is
    published. MODEL is the name of a trained model (`convnext-mm zoo`), whose
    weights are fetched; a config with a CHECKPOINT (path or address); or a work
    folder, whose best checkpoint is taken."""
    if gpus:
        return launch(ctx, gpus)
    if corruptions:
        from convnext_mm.apis.corruptions import test_corruptions

        severities = severities or (1, 2, 3, 4, 5)
        test_corruptions(corruptions=corruptions, severities=severities, **options)
        return 0
    from convnext_mm.apis.test import test
    from convnext_mm.engine.errors import ConfigError

    if severities:
        raise ConfigError('--severities is of --corruptions: add --corruptions all')

    test(**options)
    return 0
