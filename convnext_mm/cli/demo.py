"""The demo."""

from typing import Any

import click

from .options import Command, config_options

CONFIG = 'mask-rcnn_convnext-atto_shapes-520it'


class Goal(click.ParamType):
    """``METRIC=NUMBER``."""

    name = 'METRIC=NUMBER'

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        name, _, number = value.partition('=')
        try:
            return name, float(number)
        except ValueError:
            self.fail(f'{value!r} is not METRIC=NUMBER', param, ctx)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm demo
  convnext-mm demo upernet_convnext-atto_shapes --require mIoU=0.80""",
)
@click.argument('config', default=CONFIG)
@config_options
@click.option(
    '--resume',
    is_flag=True,
    help='Go on with a demo that was interrupted; without, it starts anew.',
)
@click.option(
    '--require',
    'goals',
    multiple=True,
    type=Goal(),
    help='Figures to reach, such as bbox_mAP_50=0.70; without, the demo shows what it '
    'reached.',
)
def command(
    config: str,
    work_dir: str | None,
    goals: tuple[tuple[str, float], ...],
    **options: Any,
) -> int:
    """Train CONFIG, by default a small Mask R-CNN, on the shapes data set, which is
    drawn first; then show metrics, predictions beside ground truth and curves.
    Three minutes on two idle CPU cores. Writes to work_dirs/demo. Ends with status 1
    if a required figure is not reached."""
    from convnext_mm.apis.demo import run_demo

    if work_dir is None and config == CONFIG:
        work_dir = 'work_dirs/demo'
    reached = run_demo(config, dict(goals), work_dir=work_dir, **options)
    return 0 if reached else 1
