"""Draws result files of tools/benchmark.py: one panel of bars for each mode and
dtype, with quartiles, and the floor as a dashed line.

    python tools/plot_benchmark.py benchmarks/*.json --out benchmarks/plot.png
"""
import argparse
import json
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

OURS, PEERS, FLOOR = '#c2543d', '#8a94a6', '#333333'
DTYPE_NAMES = dict(fp32='fp32', amp='bf16 autocast', bf16='bf16')


def is_ours(network: str) -> bool:
    return network.startswith(('eager', 'lean'))


def read_panels(paths: List[str]) -> Dict[Tuple[str, str, str], List[dict]]:
    """Rows of all files by (case, mode, dtype), in the files' order.

    Raises:
        ValueError: A file is no result of the benchmark.
    """
    panels: Dict[Tuple[str, str, str], List[dict]] = {}
    for path in paths:
        result = json.loads(Path(path).read_text())
        if 'rows' not in result:
            raise ValueError(f'{path} is no result of tools/benchmark.py')
        height, width = result['size']
        case = f'{result["arch"]}, {result["batch"]}x3x{height}x{width}'
        for row in result['rows']:
            panels.setdefault((case, row['mode'], row['dtype']),
                              []).append(row)
    return panels


def draw_panel(axis, title: Tuple[str, str, str], rows: List[dict]) -> None:
    case, mode, dtype = title
    memory = mode == 'memory'
    values = [r['saved_bytes'] / 2**20 if memory else r['median_ms']
              for r in rows]
    errors = None
    if not memory:
        errors = list(zip(*((r['median_ms'] - r['quartiles_ms'][0],
                             r['quartiles_ms'][1] - r['median_ms'])
                            for r in rows)))
        axis.axvline(rows[0]['floor_ms'], color=FLOOR, linestyle='--',
                     linewidth=1)
    names = [r['network'] for r in rows]
    bars = axis.barh(
        names, values, xerr=errors,
        color=[OURS if is_ours(n) else PEERS for n in names])
    axis.bar_label(bars, fmt='%.0f', padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel('MiB saved for backward' if memory else 'ms')
    axis.set_title(f'{mode}, {DTYPE_NAMES[dtype]}\n{case}', fontsize=10)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('results', nargs='+', metavar='FILE.json')
    parser.add_argument('--out', required=True, metavar='FILE.png')
    args = parser.parse_args(argv)
    try:
        panels = read_panels(args.results)
    except (OSError, ValueError) as error:
        raise SystemExit(f'error: {error}')
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, rows) in zip(axes.flat, panels.items()):
        draw_panel(axis, title, rows)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == '__main__':
    main()
