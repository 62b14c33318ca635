"""The road from ResNet to ConvNeXt as a picture, after figure 2 of arXiv
2201.03545."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .output import COLOURS, GRID, save
from .roadmap import Row
from .roadmap_facts import ENDS, GROUPS, PEERS

GREY = '#5f6b7a'
COLOUR_OF = dict(zip(GROUPS, (GREY, *COLOURS)))
HATCH = '////'
PRINTED: dict[str, Any] = dict(
    color='white', marker='D', markersize=5, markeredgecolor='black', linestyle='none'
)


class _Panel(NamedTuple):
    title: str
    value: Callable[[Row], float]
    form: str = ''  # '': as many figures as are of use
    mark: float = 0.0  # of the peer
    is_at_zero: bool = True


def draw_roadmap(
    regime: str, rows: Sequence[Row], path: Path, conditions: str = ''
) -> Path:
    """Draws a regime: published accuracy and counted FLOPs of each step, then what
    was counted of Mask R-CNN and measured.

    Args:
        regime: A key of :data:`convnext_mm.archs.ROADMAP`.
        rows: From :func:`convnext_mm.apis.show.roadmap.walk`.
        path: PNG to write.
        conditions: Under which was measured, for the title.

    Raises:
        ConfigError: It cannot be written there.
    """
    peer = PEERS[regime]
    panels = [
        _Panel(
            'top 1, %\n(published)',
            lambda r: r.top1,
            '.2f',
            peer.top1,
            is_at_zero=False,
        ),
        _Panel(
            'GFLOPs, 224 x 224\n(counted)', lambda r: r.flops / 1e9, '.2f', peer.gflops
        ),
    ]
    if rows[0].detector_flops is not None:
        panels.append(
            _Panel(
                'GFLOPs, Mask R-CNN\n800 x 1280 (counted)',
                lambda r: (r.detector_flops or 0) / 1e9,
            )
        )
    if rows[0].train is not None:
        panels += [
            _Panel(
                'MiB kept for backward\nof an image (measured)',
                lambda r: (r.saved_bytes or 0) / 2**20,
            ),
            _Panel('ms, forward\n(measured)', lambda r: _median(r.forward)),
            _Panel('ms, train step\n(measured)', lambda r: _median(r.train)),
        ]
    figure = Figure(
        figsize=(3.4 + 2.3 * len(panels), 1.9 + 0.31 * len(rows)), layout='constrained'
    )
    ratios = [1.7, *[1.0] * (len(panels) - 1)]
    axes = figure.subplots(1, len(panels), sharey=True, width_ratios=ratios)
    for axis, panel in zip(axes, panels):
        _draw(axis, panel, rows)
    axes[0].set_yticks(range(len(rows)), [row.step for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    # Where groups change.
    for axis in axes:
        for place, (above, below) in enumerate(itertools.pairwise(rows)):
            if above.group != below.group:
                axis.axhline(place + 0.5, color=GRID, linewidth=0.8, zorder=0)
    for place, row in enumerate(rows):
        if row.std is not None:
            axes[0].errorbar(row.top1, place, xerr=row.std, color='black', linewidth=1)
        if not row.is_printed:
            axes[1].plot(row.printed_gflops, place, **PRINTED)
    start, end = ENDS[regime]
    shown = {row.group for row in rows}
    keys: list[Artist] = [
        Patch(facecolor=colour, label=name)
        for name, colour in COLOUR_OF.items()
        if name in shown
    ]
    if not all(row.is_kept for row in rows):
        keys.append(
            Patch(facecolor='white', edgecolor='black', hatch=HATCH, label='not kept')
        )
    if not all(row.is_printed for row in rows):
        keys += axes[1].plot([], [], **PRINTED, label='printed')
    keys += axes[0].plot([], [], color='black', linestyle='--', label=peer.name)
    figure.legend(
        handles=keys,
        loc='outside lower center',
        ncols=min(len(keys), 2 * len(panels)),
        frameon=False,
        fontsize=9,
    )
    title = f'From {start} to {end}'
    if rows[0].train is not None and conditions:
        title += f'; measured: {conditions}'
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _median(times: dict | None) -> float:
    return times['median_ms'] if times else 0.0


def _draw(axis: Axes, panel: _Panel, rows: Sequence[Row]) -> None:
    values = [panel.value(row) for row in rows]
    low, high = 0.0, max(*values, panel.mark)
    if not panel.is_at_zero:
        low = int(min(values)) - 1.0
    if panel.mark:
        axis.axvline(panel.mark, color='black', linestyle='--', linewidth=1)
    form = panel.form or ('.0f' if high >= 100 else '.1f')
    for place, (row, value) in enumerate(zip(rows, values)):
        colour = COLOUR_OF[row.group]
        axis.barh(
            place,
            value - low,
            left=low,
            height=0.76,
            color=colour if row.is_kept else 'white',
            edgecolor=colour,
            hatch=None if row.is_kept else HATCH,
        )
        # At the foot, where no line crosses it.
        axis.annotate(
            f'{value:{form}}',
            (low, place),
            (4, 0),
            textcoords='offset points',
            va='center',
            fontsize=8.5,
            color='white' if row.is_kept else 'black',
            bbox=None if row.is_kept else dict(fc='white', ec='none', pad=2),
        )
    axis.set_xlim(low, high + 0.04 * (high - low))
    axis.set_title(panel.title, fontsize=9)
    axis.tick_params(labelsize=8, length=0)
    axis.tick_params(axis='y', labelsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.spines[['top', 'right']].set_visible(False)
