"""Training."""

from typing import Any

import click

from .options import Command, complete_config, config_options, gpus_option, launch


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm train mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco --gpus 8
  convnext-mm train my_config.py --cfg-options train_dataloader.batch_size=4
  convnext-mm train my_config.py --resume""",
)
@click.argument('config', shell_complete=complete_config)
@config_options
@gpus_option
@click.option(
    '--amp',
    is_flag=True,
    help='Train in mixed precision: bfloat16 where device and model allow it, float16 '
    'on other GPUs, fp32 on other CPUs.',
)
@click.option(
    '--auto-scale-lr',
    is_flag=True,
    help="Scale the learning rate by batch size over the config's "
    'auto_scale_lr.base_batch_size.',
)
@click.option(
    '--resume',
    is_flag=False,
    flag_value='auto',
    metavar='[CHECKPOINT]',
    help='Go on from this checkpoint; without a path, or with "auto", from the newest '
    'one in the work folder that can be read.',
)
@click.option(
    '--overwrite',
    is_flag=True,
    help='Delete the checkpoints of another run in the work folder (with --resume '
    'CHECKPOINT, the newer ones).',
)
@click.option(
    '--profile',
    is_flag=False,
    flag_value=3,
    type=int,
    metavar='[STEPS]',
    help='Profile so many steps (3) after some for warm-up, write a trace and a table '
    "of the step's largest costs to WORK_DIR/profile, and stop.",
)
@click.option(
    '--logger',
    'loggers',
    multiple=True,
    type=click.Choice(['tensorboard', 'csv', 'wandb', 'mlflow']),
    help='Also log there; one or several.',
)
@click.pass_context
def command(
    ctx: click.Context, /, config: str, gpus: int | None, **options: Any
) -> Any:
    """Train the model of CONFIG: MMDetection's, MMSegmentation's or MMPretrain's,
    whichever its default_scope says. CONFIG is a path, or the name of a recipe
    (`convnext-mm zoo`). Without a GPU it trains on the CPU."""
    if gpus:
        return launch(ctx, gpus)
    from convnext_mm.apis.train import train

    train(config, **options)
    return 0
