"""Profiling."""

from typing import Any

import click

from .options import Command, complete_config, config_options


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm profile my_config.py
  convnext-mm profile my_config.py --steps 10 --amp --work-dir profiles/amp""",
)
@click.argument('config', shell_complete=complete_config)
@config_options
@click.option('--amp', is_flag=True, help='In mixed precision, as `train --amp`.')
@click.option(
    '--steps',
    type=int,
    default=3,
    show_default=True,
    help='Training steps to profile, after some for warm-up.',
)
def command(config: str, steps: int, **options: Any) -> None:
    """Profile training steps of CONFIG: writes a trace and a table of the step's
    largest costs to WORK_DIR/profile."""
    from convnext_mm.apis.train import train

    train(config, profile=steps, **options)
