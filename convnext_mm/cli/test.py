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
  convnext-mm test work_dirs/my_config --show-dir pictures""",
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
@click.pass_context
def command(ctx: click.Context, /, gpus: int | None, **options: Any) -> int:
    """Evaluate MODEL on its test set, and print what was measured beside what is
    published. MODEL is the name of a trained model (`convnext-mm zoo`), whose
    weights are fetched; a config with a CHECKPOINT (path or address); or a work
    folder, whose best checkpoint is taken."""
    if gpus:
        return launch(ctx, gpus)
    from convnext_mm.apis.test import test

    test(**options)
    return 0
