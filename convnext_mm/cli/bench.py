"""Benchmarks."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from convnext_mm.archs import ARCHS

from .options import Command

MODES = ('infer', 'train', 'memory', 'detector', 'segmentor')


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm bench --mode train --dtype fp32 --out x.json
  convnext-mm bench --mode detector --device cuda --dtype amp --out y.json
  convnext-mm bench --plot x.json y.json --out plot.png""",
)
@click.option(
    '--mode',
    multiple=True,
    type=click.Choice(MODES),
    help="'detector': a train step of Mask R-CNN, 'segmentor': of UPerNet, one at a "
    'time.  [default: infer train memory, of the backbone]',
)
@click.option(
    '--dtype',
    multiple=True,
    help="'amp': bf16 autocast of fp32 weights, 'amp-fp16': fp16's; whole models take "
    "these and 'fp32'.  [default: fp32 amp bf16; whole models: fp32]",
)
@click.option('--arch', type=click.Choice(list(ARCHS)), help='[default: tiny]')
@click.option('--batch', type=int, help='[default: 2]')
@click.option(
    '--size',
    type=int,
    nargs=2,
    metavar='H W',
    help='[default: 256 256; detector: 800 1344; segmentor: 512 512]',
)
@click.option(
    '--networks',
    multiple=True,
    help="'lean+deploy' is 'lean' after switch_to_deploy(), for inference only.  "
    "[default: all that run on the device; whole models: 'auto mmpretrain']",
)
@click.option(
    '--compile',
    multiple=True,
    metavar='NETWORK',
    help='Networks to add compiled for fixed shapes.',
)
@click.option(
    '--compile-backend',
    metavar='NAME',
    help="Of torch.compile; 'aot_eager' traces and generates no code.",
)
@click.option(
    '--fit-gib',
    multiple=True,
    type=float,
    metavar='GIB',
    help='Whole models: find the largest batch that trains with so much GPU memory.',
)
@click.option('--rounds', type=int, help='Measured rounds.  [default: 5]')
@click.option('--warmup', type=int, help='Rounds before.  [default: 1; on a GPU 3]')
@click.option('--device', type=click.Choice(['cpu', 'cuda']), help='[default: cpu]')
@click.option(
    '--clock',
    type=click.Choice(['wall', 'cpu']),
    help='cpu: time spent computing, for one thread on a busy machine.',
)
@click.option('--threads', type=int, help='Of the CPU.  [default: 1]')
@click.option(
    '--plot',
    multiple=True,
    metavar='FILE.json',
    help='Measure nothing: draw result files into --out FILE.png.',
)
@click.option('--out', required=True, type=click.Path(path_type=Path), help='To write.')
@click.pass_context
def command(ctx: click.Context, /, out: Path, plot: tuple, **options: Any) -> None:
    """Time ConvNeXt backbones, or whole detectors and segmentors with them, side by
    side, and write one json file.

    All networks run in this process, with the same weights (checked: their maps must
    agree first), taking turns round after round, so that what else the machine does
    hits all alike. Memory is what hooks see saved for backward, each memory block
    once, parameters not counted; on a GPU also the peak of what a network allocates
    and owns."""
    from convnext_mm.apis.benchmark import OURS, Settings, run
    from convnext_mm.engine.errors import ConfigError

    given = {k: v for k, v in options.items() if v not in (None, ())}
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    words = shlex.join(['convnext-mm', 'bench', *ctx.meta['arguments']])
    try:
        if plot:
            from convnext_mm.apis.benchmark.plot import plot as draw

            draw(list(plot), str(out))
            return
        result = run(Settings(**given), out, words)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    skipped = result['skipped']
    _print_rows(result['rows'], skipped)
    failed = [name for name in skipped if name in OURS]
    if failed:
        raise ConfigError(
            f'{", ".join(failed)} of this package did not run, see above; the others '
            f'are in {out}'
        )


def _print_rows(rows: Sequence[dict], skipped: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Callable[[dict], str]] = {
        'mode': lambda row: row['mode'],
        'dtype': lambda row: row['dtype'],
        'network': lambda row: row['network'],
        'ms': lambda row: f'{row["median_ms"]:.1f}',
        'floor': lambda row: f'{row["share_of_floor"]:.0%}',
        'saved, MiB': lambda row: f'{row["saved_bytes"] / 2**20:.1f}',
        'peak, MiB': lambda row: f'{row["peak_bytes"] / 2**20:.1f}',
        'largest batch': lambda row: ', '.join(
            f'{n} in {gib} GiB' for gib, n in row['largest_batch'].items()
        ),
    }
    table, grid = Table(), []
    for head, cell in columns.items():
        cells = []
        for row in rows:
            try:
                cells.append(cell(row))
            except KeyError:  # not measured in this mode or on this device
                cells.append('')
        if any(cells):
            table.add_column(head, no_wrap=True)
            grid.append(cells)
    for row_cells in zip(*grid):
        table.add_row(*row_cells)
    console = Console()
    console.print(table)
    for name, reason in skipped.items():
        console.print(f'skipped {name}: {reason}', markup=False, highlight=False)
