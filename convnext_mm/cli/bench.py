"""Benchmarks."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from convnext_mm.archs import ARCHS

from .options import Command

ALL = 'all'  # what --paper without a block is
MODES = (
    *('infer', 'train', 'memory', 'detector', 'cascade', 'segmentor'),
    *('detector-infer', 'cascade-infer', 'segmentor-infer'),
)


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm bench --mode train --dtype fp32 --out x.json
  convnext-mm bench --mode detector --device cuda --dtype amp --out y.json
  convnext-mm bench --plot x.json y.json --out plot.png
  convnext-mm bench --paper --device cuda --out paper.json
  convnext-mm bench --paper throughput --arch tiny --size 64 64 --out paper.json""",
)
@click.option(
    '--paper',
    multiple=True,
    is_flag=False,
    flag_value=ALL,
    metavar='[BLOCK]',
    help="Measure the paper's tables, beside the published figures: all, or some of "
    'throughput, detectors, memory, isotropic. An --out of an earlier run is '
    'continued.',
)
@click.option(
    '--mode',
    multiple=True,
    type=click.Choice(MODES),
    help="'detector': a train step of Mask R-CNN, 'cascade': of Cascade Mask R-CNN, "
    "'segmentor': of UPerNet; with '-infer' they look at images. One at a time.  "
    '[default: infer train memory, of the backbone]',
)
@click.option(
    '--dtype',
    multiple=True,
    help="'amp': bf16 autocast of fp32 weights, 'amp-fp16': fp16's; whole models take "
    "these and 'fp32'.  [default: fp32 amp bf16; whole models: fp32]",
)
@click.option(
    '--arch',
    multiple=True,
    type=click.Choice(list(ARCHS)),
    help='With --paper several.  [default: tiny; --paper: all of the table]',
)
@click.option(
    '--batch',
    type=int,
    help='[default: 2; --paper: of classifiers in inference, on a GPU 64]',
)
@click.option(
    '--size',
    type=int,
    nargs=2,
    metavar='H W',
    help='[default: 256 256; detector, cascade: 800 1344; segmentor: 512 512; to look '
    "at images and --paper: the paper's]",
)
@click.option(
    '--networks',
    multiple=True,
    help="'lean+deploy' is 'lean' after switch_to_deploy(), for inference only.  "
    "Whole models have 'resnet50' and 'swin', too.  "
    "[default: all that run on the device; whole models: 'auto mmpretrain'; --paper: "
    "'auto paper mmpretrain resnet50 swin']",
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
    help='Find the largest batch that trains with so much GPU memory.',
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
def command(
    ctx: click.Context, /, out: Path, plot: tuple, paper: tuple, **options: Any
) -> None:
    """Time ConvNeXt backbones, or whole detectors and segmentors with them, side by
    side, and write one json file.

    All networks run in this process, with the same weights (checked: their maps must
    agree first), taking turns round after round, so that what else the machine does
    hits all alike. Memory is what hooks see saved for backward, each memory block
    once, parameters not counted; on a GPU also the peak of what a network allocates
    and owns."""
    from convnext_mm.engine.errors import ConfigError

    given = {k: v for k, v in options.items() if v not in (None, ())}
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}
    words = shlex.join(['convnext-mm', 'bench', *ctx.meta['arguments']])
    try:
        if plot and paper:
            raise ConfigError('--plot and --paper: give each a run of its own')
        if plot:
            from convnext_mm.apis.benchmark.plot import plot as draw

            draw(list(plot), str(out))
        elif paper:
            _run_paper(paper, given, out, words)
        else:
            _run(given, out, words)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _run(given: dict[str, Any], out: Path, words: str) -> None:
    from convnext_mm.apis.benchmark import OURS, Settings, run
    from convnext_mm.engine.errors import ConfigError

    if 'arch' in given:
        if len(given['arch']) > 1:
            raise ConfigError(
                f'--arch {" ".join(given["arch"])}: several are for --paper; give each '
                'a run of its own'
            )
        given['arch'] = given['arch'][0]
    result = run(Settings(**given), out, words)
    skipped = result['skipped']
    _print_rows(result['rows'], skipped)
    failed = [name for name in skipped if name.split(',')[0] in OURS]
    if failed:
        raise ConfigError(
            f'{", ".join(failed)} of this package did not run, see above; the others '
            f'are in {out}'
        )


def _run_paper(
    paper: Sequence[str], given: dict[str, Any], out: Path, words: str
) -> None:
    from rich.console import Console

    from convnext_mm.apis.benchmark import PaperSettings, run_paper
    from convnext_mm.apis.benchmark.tables import problems, tables, unmeasured
    from convnext_mm.engine.errors import ConfigError

    for name in ('mode', 'compile', 'compile_backend', 'fit_gib'):
        if name in given:
            raise ConfigError(
                f'--{name.replace("_", "-")} and --paper: the tables are fixed; leave '
                'one of the two out'
            )
    blocks = [] if ALL in paper else list(dict.fromkeys(paper))
    settings = PaperSettings(blocks=blocks, **given)
    result = run_paper(settings, out, words)
    console = Console()
    for table in tables(result):
        console.print(table)
    for line in (*settings.left_out(), *problems(result)):
        console.print(line, markup=False, highlight=False)
    if rows := unmeasured(result):
        raise ConfigError(
            f'{len(rows)} cells have no figure: {", ".join(rows)}; the others are in '
            f'{out}. To try again, take a smaller --batch or leave networks out by '
            '--networks, and name another --out'
        )


def _print_rows(rows: Sequence[dict], skipped: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Callable[[dict], str]] = {
        'mode': lambda row: row['mode'],
        'dtype': lambda row: row['dtype'],
        'network': lambda row: row['network'],
        'ran': lambda row: row['implementation'],
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
