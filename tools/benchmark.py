"""Times ConvNeXt backbones, or whole detectors and segmentors with them, side
by side and writes one json file.

All networks run in this process, with the same weights (checked: their maps
must agree first), taking turns round after round, so that what else the machine
does hits all alike. Memory is what hooks see saved for backward, each memory
block once, parameters not counted; on a GPU also the peak of what a network
allocates and owns.

    python tools/benchmark.py --mode train --dtype fp32 --out benchmarks/x.json
    python tools/benchmark.py --mode detector --device cuda --dtype amp \\
        --out benchmarks/y.json
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from convnext_mm.apis.benchmark import (
    BACKBONE_MODES,
    DTYPES,
    MODEL_MODES,
    OURS,
    PEERS,
    Settings,
    run,
)
from convnext_mm.archs import ARCHS


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=[*BACKBONE_MODES, *MODEL_MODES],
        help="default: infer train memory, of the backbone; 'detector': a\n"
        "train step of Mask R-CNN, 'segmentor': of UPerNet, one at a time",
    )
    parser.add_argument(
        '--dtype',
        nargs='+',
        choices=DTYPES,
        help="default: fp32 amp bf16; whole models: fp32. 'amp': bf16\n"
        "autocast of fp32 weights, 'amp-fp16': fp16's; whole models take\n"
        "these and 'fp32'",
    )
    parser.add_argument('--arch', choices=ARCHS)
    parser.add_argument('--batch', type=int)
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='default: 256 256; detector: 800 1344; segmentor: 512 512',
    )
    parser.add_argument(
        '--networks',
        nargs='+',
        choices=[*PEERS, *OURS],
        help="default: all that run on the device; 'lean+deploy' is 'lean'\n"
        'after switch_to_deploy(), and takes part in inference only; whole\n'
        "models: 'auto mmpretrain'",
    )
    parser.add_argument(
        '--compile',
        nargs='+',
        metavar='NETWORK',
        choices=[*PEERS, *OURS],
        help='networks to add compiled for fixed shapes',
    )
    parser.add_argument(
        '--compile-backend',
        metavar='NAME',
        help="of torch.compile; 'aot_eager' traces and generates no code",
    )
    parser.add_argument(
        '--fit-gib',
        nargs='+',
        type=float,
        metavar='GIB',
        help='whole models: find the largest batch that trains with so much\n'
        'GPU memory',
    )
    parser.add_argument('--rounds', type=int)
    parser.add_argument(
        '--warmup', type=int, help='rounds before (default: 1; on a GPU 3)'
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'])
    parser.add_argument(
        '--clock',
        choices=['wall', 'cpu'],
        help='cpu: time spent computing, for one thread on a busy machine',
    )
    parser.add_argument('--threads', type=int)
    parser.add_argument('--out', required=True, type=Path, metavar='FILE.json')
    parser.set_defaults(
        **{field.name: field.default for field in dataclasses.fields(Settings)}
    )
    return parser.parse_args(argv)


def print_rows(rows: list[dict], skipped: dict[str, str]) -> None:
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
    for cells in zip(*grid):
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for name, reason in skipped.items():
        console.print(f'skipped {name}: {reason}', markup=False, highlight=False)


def main(argv=None) -> None:
    args = vars(parse_args(argv))
    out = args.pop('out')
    command = shlex.join(['python', 'tools/benchmark.py', *(argv or sys.argv[1:])])
    try:
        result = run(Settings(**args), out, command)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    skipped = result['skipped']
    print_rows(result['rows'], skipped)
    failed = [name for name in skipped if name in OURS]
    if failed:
        raise SystemExit(
            f'error: {", ".join(failed)} of this package did not '
            f'run, see above; the others are in {out}'
        )


if __name__ == '__main__':
    main()
