"""Result files as bars."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from convnext_mm.analysis.meter import summary

from .networks import OTHERS, PEERS
from .published import PAPER_KIND

OURS_COLOUR, PEER_COLOUR, FLOOR_COLOUR = '#c2543d', '#8a94a6', '#333333'
DTYPE_NAMES = {'amp': 'bf16 autocast', 'amp-fp16': 'fp16 autocast'}
COLUMNS = 3


class Bar(NamedTuple):
    network: str
    value: float
    quartiles: Sequence[float] = ()
    floor: float = 0.0


def is_ours(network: str) -> bool:
    return network.split()[0] not in (*PEERS, *OTHERS)


def bars_of(row: dict) -> dict[str, Bar]:
    """The quantities that a row of a result holds, by the axis's label."""
    name, bars = row['network'], {}
    if 'median_ms' in row:
        quartiles = summary(row['times_ms'])['quartiles_ms']
        bars['ms'] = Bar(name, row['median_ms'], quartiles, row.get('floor_ms', 0))
    if 'saved_bytes' in row:
        bars['MiB saved for backward'] = Bar(name, row['saved_bytes'] / 2**20)
    if 'peak_bytes' in row:
        bars['MiB at the peak'] = Bar(name, row['peak_bytes'] / 2**20)
    for gib, batch in row.get('largest_batch', {}).items():
        bars[f'images that fit in {gib} GiB'] = Bar(name, batch)
    return bars


def read_panels(paths: Sequence[str]) -> dict[tuple[str, str, str], list[Bar]]:
    """Bars by (path, title, label of the axis), in the files' order; of several
    results where a file holds them as parts.

    Raises:
        ValueError: A file is no result of the benchmark.
    """
    panels: dict[tuple[str, str, str], list[Bar]] = {}
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f'{path} cannot be read: {error.strerror}') from error
        except ValueError:
            result = None
        if not isinstance(result, dict) or not {'rows', 'parts'} & {*result}:
            raise ValueError(f'{path} is no result of `convnext-mm bench`')
        if result.get('kind') == PAPER_KIND:
            raise ValueError(
                f'{path} holds the tables of `convnext-mm bench --paper`, which are '
                'not drawn; the command inside, run again, prints them'
            )
        for part in result['parts'].values() if 'parts' in result else [result]:
            if not part.get('rows'):
                continue
            height, width = part['size']
            case = f'{part["arch"]}, {part["batch"]}x3x{height}x{width}'
            for row in part['rows']:
                dtype = DTYPE_NAMES.get(row['dtype'], row['dtype'])
                for label, bar in bars_of(row).items():
                    title = f'{row["mode"]}, {dtype}\n{case}'
                    panels.setdefault((path, title, label), []).append(bar)
    return panels


def draw_panel(axis: Any, title: str, label: str, bars: list[Bar]) -> None:
    errors = None
    if bars[0].quartiles:
        errors = list(
            zip(
                *(
                    (bar.value - bar.quartiles[0], bar.quartiles[1] - bar.value)
                    for bar in bars
                )
            )
        )
        if bars[0].floor:
            axis.axvline(bars[0].floor, color=FLOOR_COLOUR, linestyle='--', linewidth=1)
    drawn = axis.barh(
        [bar.network for bar in bars],
        [bar.value for bar in bars],
        xerr=errors,
        color=[OURS_COLOUR if is_ours(bar.network) else PEER_COLOUR for bar in bars],
    )
    largest = max(bar.value for bar in bars)
    axis.bar_label(
        drawn, fmt='%.0f' if largest >= 30 else '%.3g', padding=3, fontsize=8
    )
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)


def plot(paths: Sequence[str], out: str) -> None:
    """Draws a panel for each file, mode, dtype and quantity into one picture.

    Raises:
        OSError, ValueError: A file cannot be read, is no result, or none holds
            a row.
    """
    panels = read_panels(paths)
    if not panels:
        raise ValueError(
            'the results hold no rows: every network was '
            'skipped, "skipped" in the files says why'
        )
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout='tight')
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((_, title, label), bars) in zip(axes.flat, panels.items()):
        draw_panel(axis, title, label, bars)
    figure.savefig(out, dpi=110)
