"""Parameters and FLOPs."""

import click

from .options import Command, complete_config


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm flops mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco
  convnext-mm flops my_config.py --shape 512 512""",
)
@click.argument('config', shell_complete=complete_config)
@click.option(
    '--shape',
    type=click.IntRange(1),
    nargs=2,
    metavar='H W',
    help='Size of the image.  [default: 800 1280 for a detector, the test scale for a '
    'segmentor, the test crop for a classifier]',
)
def command(config: str, shape: tuple[int, int] | None) -> None:
    """Print parameters and FLOPs of CONFIG's model, part by part, counted as in the
    ConvNeXt papers: multiply-accumulates for one image; a two-stage detector sends
    1000 proposals through every box head and 100 through every mask head; an
    auxiliary head counts in parameters only."""
    from rich.console import Console
    from rich.table import Table

    from convnext_mm.analysis.complexity import default_shape, measure, total
    from convnext_mm.apis.config import load_config
    from convnext_mm.apis.quiet import quiet
    from convnext_mm.engine.errors import ConfigError

    cfg = load_config(config)
    try:
        size = shape or default_shape(cfg)
        with quiet():
            costs = measure(cfg, size)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    table = Table(title=f'{config}, one image of {size[0]} x {size[1]}')
    table.add_column('part')
    table.add_column('parameters (M)', justify='right')
    table.add_column('FLOPs (G)', justify='right')
    shown = {name: cost for name, cost in costs.items() if cost != (0, 0)}
    for name, cost in [*shown.items(), ('total', total(costs))]:
        if name == 'total':
            table.add_section()
        table.add_row(
            name,
            f'{cost.params / 1e6:.2f}',
            f'{cost.flops / 1e9:.1f}',
            style='bold' if name == 'total' else None,
        )
    Console().print(table)
