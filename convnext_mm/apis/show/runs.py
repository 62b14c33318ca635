"""What runs logged: losses, metrics, learning rate, memory, speed."""

import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from convnext_mm.engine.errors import ConfigError

from .output import COLOURS, GRID, save

SCALARS = '*/vis_data/scalars.json'
# Logged beside losses and metrics.
OTHERS = ('base_lr', 'data_time', 'epoch', 'iter', 'lr', 'memory', 'step', 'time')
COLUMNS = 3
MAX_METRICS = 6
Point = tuple[int, float]  # iteration, value


class Best(NamedTuple):
    """A metric of a run.

    Attributes:
        last: Of the last evaluation.
        best: The highest of all, or the lowest of a loss; NaN where all are.
        iteration: Of the best.
    """

    last: float
    best: float
    iteration: int


class Run(NamedTuple):
    """What a run logged, over all the times that it was resumed.

    Attributes:
        name: Its folder.
        training: Name to (iteration, value), ascending: losses, ``lr``, ``time`` in
            seconds per iteration, ``memory`` in MB on a GPU.
        metrics: Name to (iteration, value), ascending.
        attempts: Starts that logged something.
        unreadable: Lines that could not be read and are left out.
    """

    name: str
    training: dict[str, list[Point]]
    metrics: dict[str, list[Point]]
    attempts: int
    unreadable: int

    @property
    def iterations(self) -> int:
        """The last iteration that was logged."""
        series = (*self.training.values(), *self.metrics.values())
        return max(points[-1][0] for points in series)

    @property
    def last_loss(self) -> float | None:
        """The last logged sum of all losses."""
        losses = self.training.get('loss')
        return losses[-1][1] if losses else None

    @property
    def seconds(self) -> float | None:
        """Median time of an iteration."""
        times = [value for _, value in self.training.get('time', ()) if value == value]
        return statistics.median(times) if times else None

    @property
    def max_memory(self) -> float | None:
        """Highest memory of a GPU in MB."""
        return max(
            (value for _, value in self.training.get('memory', ())), default=None
        )

    def best(self, metric: str) -> Best | None:
        """The last and the best value of a metric; None where it has none."""
        points = self.metrics.get(metric)
        if not points:
            return None
        known = [point for point in points if not math.isnan(point[1])]
        pick = min if 'loss' in metric else max
        iteration, best = pick(known or points, key=lambda point: point[1])
        return Best(points[-1][1], best, iteration)


class _Record(NamedTuple):
    iteration: int
    is_training: bool
    values: dict[str, float]


def read_run(work_dir: str | os.PathLike) -> Run:
    """Reads the scalars of a work folder, as MMEngine's ``LocalVisBackend`` wrote
    them. Of iterations that a resumed run made again the later ones count; a line that
    a fault cut off is left out.

    Args:
        work_dir: Folder of a run, with ``TIMESTAMP/vis_data/scalars.json``.

    Raises:
        ConfigError: There is no such folder, or nothing was logged in it.
    """
    folder = Path(work_dir)
    if not folder.is_dir():
        raise ConfigError(
            f'{str(folder)!r} is no folder: give the work folder of a run, such as '
            'work_dirs/CONFIG_NAME'
        )
    joined: list[_Record] = []
    attempts = unreadable = 0
    for path in sorted(folder.glob(SCALARS)):
        records, broken = _read(path)
        unreadable += broken
        if records:
            attempts += 1
            joined = _join(joined, records)
    if not joined:
        raise ConfigError(
            f'{str(folder)!r} has no record in {SCALARS.replace("*", "TIMESTAMP")}: '
            'give the work folder of a run that logged something'
        )
    training: dict[str, list[Point]] = {}
    metrics: dict[str, list[Point]] = {}
    for record in joined:
        series = training if record.is_training else metrics
        for name, value in record.values.items():
            if record.is_training or name not in OTHERS:
                series.setdefault(name, []).append((record.iteration, value))
    # COCO has -1 where there are no such objects.
    metrics = {n: p for n, p in metrics.items() if any(value != -1 for _, value in p)}
    return Run(str(folder), training, metrics, attempts, unreadable)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a file, and the number of lines that are none."""
    try:
        lines = path.read_text(errors='replace').splitlines()
    except OSError as error:
        raise ConfigError(
            f'{str(path)!r} cannot be read ({error.strerror}): make it readable'
        ) from error
    records, broken = [], 0
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get('step'), int):
            records.append(record)
        else:
            broken += bool(line.strip())
    return records, broken


def _join(before: list[_Record], raw: list[dict[str, Any]]) -> list[_Record]:
    """The records of a later start behind those that it did not make again."""
    trained = [record['step'] for record in raw if _is_training(record)]
    kept = before
    if trained:
        kept = [r for r in before if r.iteration < trained[0]]
    last = max((r.iteration for r in kept if r.is_training), default=0)
    new = []
    for record in raw:
        step = record['step']
        if _is_training(record):
            last = step
        # MMEngine counts evaluations of a training by epochs in epochs: these
        # belong to the iteration before.
        iteration = max(step, last)
        new.append(_Record(iteration, _is_training(record), dict(_numbers(record))))
    if trained:
        start = min(record.iteration for record in new)
        kept = [r for r in kept if r.iteration < start or r.is_training]
    return kept + new


def _is_training(record: dict[str, Any]) -> bool:
    return 'iter' in record or 'lr' in record or 'train/lr' in record


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, (int, float)):
            # Where log_with_hierarchy is set.
            yield name.removeprefix('train/').removeprefix('val/'), float(value)


def main_metrics(runs: Sequence[Run]) -> list[str]:
    """Metrics of any of the runs without the finer ones: ``coco/bbox_mAP`` stands
    for ``coco/bbox_mAP_50`` as well."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return [
        name
        for name in names
        if not any(name.startswith(f'{other}_') for other in names)
    ][:MAX_METRICS]


def draw_runs(runs: Sequence[Run], path: Path) -> Path:
    """Draws all runs into one picture: a panel for the loss, each main metric, the
    learning rate, the time of an iteration, and memory.

    Args:
        runs: From :func:`read_run`.
        path: PNG to write.

    Raises:
        ConfigError: It cannot be written there.
    """
    panels: list[tuple[str, str]] = [
        ('loss', 'training loss'),
        *((name, name) for name in main_metrics(runs)),
        # The learning rate of MMEngine's log is that of the first group.
        ('lr', 'learning rate (first group)'),
        ('time', 'seconds per iteration'),
        ('memory', 'GPU memory (MB)'),
    ]
    panels = [panel for panel in panels if any(_series(run, panel[0]) for run in runs)]
    if not panels:
        raise ConfigError(
            f'{", ".join(run.name for run in runs)}: neither losses nor metrics were '
            'logged: give the work folder of a run that logged some'
        )
    longest = max(1, *(run.iterations for run in runs))
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 3.1 * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, title) in zip(axes.flat, panels):
        for number, run in enumerate(runs):
            points = _series(run, name)
            axis.plot(
                [iteration for iteration, _ in points],
                [value for _, value in points],
                color=COLOURS[number % len(COLOURS)],
                linestyle=('-', '--', ':')[number // len(COLOURS) % 3],
                marker='o' if name in run.metrics else None,
                markersize=4,
                label=run.name,
            )
        if name == 'loss' and len(runs) == 1:
            _draw_parts(axis, runs[0])
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.02 * longest)
        if name in ('lr', 'time', 'memory'):
            axis.set_ylim(0, None)
        if name == 'lr':
            axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        axis.set_xlabel('iteration', fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(color=GRID)
        axis.spines[['top', 'right']].set_visible(False)
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    else:
        figure.legend(
            axes.flat[0].lines,
            [run.name for run in runs],
            loc='outside upper center',
            ncols=min(3, len(runs)),
            frameon=False,
        )
    return save(figure, path)


def _series(run: Run, name: str) -> list[Point]:
    return run.training.get(name) or run.metrics.get(name) or []


def _draw_parts(axis: Any, run: Run) -> None:
    """The losses that add up to the sum."""
    for name, points in run.training.items():
        if 'loss' in name and name != 'loss':
            axis.plot(*zip(*points), linewidth=0.8, alpha=0.8, label=name)
    axis.lines[0].set_label('loss')
    axis.legend(fontsize=7)
