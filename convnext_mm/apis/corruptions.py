"""How much worse a model finds what it knows on corrupted images: mPC and rPC
(arXiv 1907.07484)."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch.utils.data import Dataset

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.checkpoint.remote import fetch
from convnext_mm.checkpoint.write import write_text
from convnext_mm.datasets.corruptions import NAMES, Corrupt, check_corruption, insert
from convnext_mm.datasets.data_check import leaves
from convnext_mm.datasets.errors import DataError, short
from convnext_mm.datasets.imagenet_sets import SEVERITIES
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.launch import running
from convnext_mm.engine.settings import changes, flatten

from .config_check import check_paths
from .test import (
    OF_EVALUATORS,
    load_released_classifier,
    look_for_data,
    prepare,
    switch_to_deploy,
)
from .zoo import resolve

RESULT, PICTURE = 'corruptions.json', 'corruptions.png'
ALL = 'all'
PACKAGES = ('imagecorruptions-imaug', 'imagecorruptions')  # either has the module
Cell = tuple[str | None, int]  # corruption and severity; (None, 0) is clean
CLEAN: Cell = (None, 0)
Metrics = dict[str, float]


def test_corruptions(
    model: str,
    checkpoint: str | None = None,
    corruptions: Sequence[str] = (ALL,),
    severities: Sequence[int] = SEVERITIES,
    deploy: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on its test set as it is and under corruptions; writes each
    result as soon as it is there into ``corruptions.json`` in the work folder, and
    goes on where that file ends; then prints tables and draws ``corruptions.png``.

    Args:
        model, checkpoint: Of :func:`convnext_mm.apis.zoo.resolve`.
        corruptions: Some of :data:`convnext_mm.datasets.corruptions.NAMES`, or
            ``all``.
        severities: Of 1 to 5.
        deploy: Fold and pack the backbone for inference first.
        **options: Of :func:`convnext_mm.apis.test.prepare`, but for those that write
            or show predictions.

    Returns:
        ``clean``, a dict of metrics; ``mPC``, their means over corruptions and
        severities; ``rPC``, mPC by clean. Without metrics that a clean image set has
        not (COCO's -1), or that are no number; rPC without those that are 0.

    Raises:
        ConfigError: A path or setting is wrong, or the file in the work folder is of
            another model, checkpoint or setting.
        CheckpointError: The checkpoint cannot be used.
        DataError: There is no such corruption or severity; the data is missing or
            bad, or an image too small.
    """
    for name in ('out', 'show', 'show_dir'):
        if options.get(name):
            raise ConfigError(
                f'--{name.replace("_", "-")} is for one evaluation, and --corruptions '
                'makes one for each corruption and severity: leave one of them out'
            )
    options.pop('out', None)
    cells = cells_of(corruptions, severities)
    corrupt = Corrupt()
    check_paths(model, checkpoint)
    look_for_data(model, checkpoint, options)
    config, checkpoint, _ = resolve(model, checkpoint)
    cfg = prepare(config, checkpoint, **options)
    # Workers that stay would go on with the corruption they started with.
    cfg.test_dataloader.persistent_workers = False
    file = Path(cfg.work_dir, RESULT)
    with running(cfg) as runner:
        data = fingerprint(runner.test_loop.dataloader.dataset)
        settings = settings_of(cfg, checkpoint, deploy, bool(options.get('tta')), data)
        known, starts = _known(file, settings)
        result: dict[str, Any] = dict(model=model, settings=settings, starts=starts)
        missing = [cell for cell in (CLEAN, *cells) if cell not in known]
        if missing:
            command = shlex.join(['convnext-mm', *sys.argv[1:]])
            start = dict(command=command, machine=machine(), versions=versions())
            starts.append(start)
            load_released_classifier(runner, checkpoint)
            if deploy:
                switch_to_deploy(runner)
            loop = runner.test_loop
            insert(loop.dataloader.dataset, corrupt)

            def note(cell: Cell, metrics: Metrics) -> None:
                known[cell] = metrics
                if is_main_process():
                    _write(file, result, known)

            runner._test_loop = _Cells(runner, loop, corrupt, missing, note)
            if len(missing) <= len(cells):
                print_log(
                    f'{file} has {len(cells) + 1 - len(missing)} of {len(cells) + 1} '
                    'results; the rest follows.',
                    'current',
                )
            runner.test()
        summary = summarise(known, cells)
        if is_main_process():
            _write(file, {**result, 'summary': summary}, known)
            report(known, summary)
            plot(known, summary, file.with_name(PICTURE))
            print_log(f'Written: {file}, {file.with_name(PICTURE)}', 'current')
    return summary


def cells_of(corruptions: Sequence[str], severities: Sequence[int]) -> list[Cell]:
    """The combinations, each once.

    Raises:
        DataError: There is no such corruption or severity, or there are none.
    """
    names = NAMES if ALL in corruptions else tuple(dict.fromkeys(corruptions))
    levels = sorted(set(severities))
    if not names or not levels:
        raise DataError(
            f'corruptions={list(corruptions)}, severities={list(severities)}: give at '
            'least one of each'
        )
    for name in (*names, *corruptions):
        for level in levels:
            if name != ALL:
                check_corruption(name, level)
    return [(name, level) for name in names for level in levels]


def settings_of(
    cfg: Config, checkpoint: str, deploy: bool, tta: bool, data: str
) -> dict[str, str]:
    """What results depend on, dotted names to text."""
    with open(fetch(checkpoint), 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return flatten(
        dict(
            checkpoint_sha256=digest.hexdigest(),
            deploy=deploy,
            tta=tta,
            imagecorruptions=_package(),
            model=cfg.model,
            data_preprocessor=cfg.get('data_preprocessor'),
            dataset=cfg.test_dataloader.dataset,
            data=data,
            evaluator=cfg.test_evaluator,
            test_cfg=cfg.test_cfg,
        )
    )


def fingerprint(dataset: Dataset) -> str:
    """Of names and sizes of the images, and of the annotations, of a data set: other
    files in the same folder are other data."""
    digest = hashlib.sha256()
    for leaf in leaves(dataset):
        if not isinstance(leaf, BaseDataset):
            continue
        leaf.full_init()
        for index in range(len(leaf)):
            info = leaf.get_data_info(index)
            for key in ('img_path', 'seg_map_path'):
                if info.get(key) and os.path.isfile(info[key]):
                    size = os.path.getsize(info[key])
                    digest.update(f'{os.path.basename(info[key])} {size}\n'.encode())
        if leaf.ann_file and os.path.isfile(leaf.ann_file):
            digest.update(Path(leaf.ann_file).read_bytes())
    return digest.hexdigest()


def _package() -> str:
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return 'unknown'


def _known(file: Path, settings: dict[str, str]) -> tuple[dict[Cell, Metrics], list]:
    """What a file has, the same on every process: metrics, and who measured them.

    Raises:
        ConfigError: It is no such file, or of other settings.
    """
    answer: list[Any] = [None, ({}, [])]
    if is_main_process() and file.exists():
        try:
            answer[1] = _read(file, settings)
        except ConfigError as error:
            answer[0] = str(error)
    broadcast_object_list(answer)
    if answer[0] is not None:
        raise ConfigError(answer[0])
    known, starts = answer[1]
    return known, starts


def _read(file: Path, settings: dict[str, str]) -> tuple[dict[Cell, Metrics], list]:
    advice = 'give another folder with --work-dir DIR, or delete the file to begin anew'
    try:
        content = json.loads(file.read_text())
        before, starts = content['settings'], content['starts']
        known = {
            (cell['corruption'], cell['severity']): cell['metrics']
            for cell in content['cells']
            if _is_whole(cell['metrics'])
        }
        if not isinstance(before, dict) or not isinstance(starts, list):
            raise TypeError('settings or starts are of another kind')
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{str(file)!r} is no result of --corruptions '
            f'({type(error).__name__}: {error}): {advice}'
        ) from error
    differing = [
        f'{name} was {old[:80]} and is {new[:80]}'
        for name, (old, new) in changes(before, settings).items()
    ]
    if differing:
        raise ConfigError(
            f'{str(file)!r} has results of another model, checkpoint or setting '
            f'({short(differing, 3)}): {advice}'
        )
    return known, starts


def _is_whole(metrics: Any) -> bool:
    """Whether a cell has a result; else it is measured again."""
    return (
        isinstance(metrics, dict)
        and bool(metrics)
        and all(
            isinstance(value, (int, float)) and math.isfinite(value)
            for value in metrics.values()
        )
    )


def _write(file: Path, result: dict[str, Any], known: dict[Cell, Metrics]) -> None:
    rows = [
        dict(corruption=name, severity=severity, metrics=metrics)
        for (name, severity), metrics in known.items()
    ]
    write_text(file, json.dumps(dict(result, cells=rows), indent=1) + '\n')


class _Cells(BaseLoop):
    """Runs a test loop once for each corruption and severity.

    Args:
        runner: Of the loop.
        loop: Any test loop, whose data set has ``corrupt`` in its pipeline.
        corrupt: Is set to what is to be evaluated.
        cells: In this order.
        note: Is called after each.
    """

    def __init__(
        self,
        runner: Runner,
        loop: BaseLoop,
        corrupt: Corrupt,
        cells: Sequence[Cell],
        note: Callable[[Cell, Metrics], None],
    ) -> None:
        super().__init__(runner, loop.dataloader)
        self.loop, self.corrupt, self.cells, self.note = loop, corrupt, cells, note

    def run(self) -> Metrics:
        """Metrics of the last."""
        console = Console(stderr=True)
        columns = (
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        is_shown = console.is_terminal and is_main_process()
        metrics: Metrics = {}
        with Progress(*columns, console=console, disable=not is_shown) as bar:
            task = bar.add_task('', total=len(self.cells))
            for number, (name, severity) in enumerate(self.cells, 1):
                what = f'{name}, severity {severity}' if name else 'clean'
                bar.update(task, description=what)
                print_log(f'{number} of {len(self.cells)}: {what}', 'current')
                self.corrupt.corruption, self.corrupt.severity = name, severity
                metrics = _numbers(self.loop.run())
                self.note((name, severity), metrics)
                bar.advance(task)
        return metrics


def _numbers(metrics: dict[str, Any]) -> Metrics:
    found = {}
    for name, value in metrics.items():
        if not isinstance(value, str) and np.ndim(value) == 0:
            number = float(value)
            if math.isfinite(number):
                found[name] = number
    return found


def summarise(known: dict[Cell, Metrics], cells: Sequence[Cell]) -> dict[str, Any]:
    """Clean metrics, their means over the cells (mPC), and the quotients (rPC)."""
    clean = known[CLEAN]
    means = {
        name: float(np.mean([known[cell][name] for cell in cells]))
        for name, value in clean.items()
        if value >= 0 and all(name in known[cell] for cell in cells)
    }
    return dict(
        corruptions=list(dict.fromkeys(name for name, _ in cells)),
        severities=sorted({severity for _, severity in cells}),
        clean=clean,
        mPC=means,
        rPC={name: mean / clean[name] for name, mean in means.items() if clean[name]},
    )


def _main_metrics(summary: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """Those to show: name in the evaluator, to the usual name and what makes it
    percent."""
    usual: dict[str, tuple[str, float]] = {
        key: (name, unit)
        for name, (key, unit, is_tta) in OF_EVALUATORS.items()
        if key in summary['mPC'] and not is_tta
    }
    return usual or {name: (name, 1) for name in list(summary['mPC'])[:1]}


def report(known: dict[Cell, Metrics], summary: dict[str, Any]) -> None:
    """Prints a table of corruptions and severities for each main metric."""
    names, severities = summary['corruptions'], summary['severities']
    for key, (title, unit) in _main_metrics(summary).items():
        table = Table(title=f'{title}, by severity')
        table.add_column('corruption')
        for head in (*map(str, severities), 'mean'):
            table.add_column(head, justify='right')
        for name in names:
            values = [unit * known[name, s][key] for s in severities]
            row = (*values, float(np.mean(values)))
            table.add_row(name, *(f'{value:.1f}' for value in row))
        table.add_section()
        rows = [
            ('clean', f'{unit * summary["clean"][key]:.1f}'),
            ('mPC', f'{unit * summary["mPC"][key]:.1f}'),
        ]
        if key in summary['rPC']:
            rows.append(('rPC', f'{summary["rPC"][key]:.1%}'))
        for label, text in rows:
            table.add_row(label, *[''] * len(severities), text)
        Console().print(table)


def plot(known: dict[Cell, Metrics], summary: dict[str, Any], path: Path) -> None:
    """Draws the main metrics, corruption by severity, the darker the closer to the
    clean ones."""
    names, severities = summary['corruptions'], summary['severities']
    shown = _main_metrics(summary)
    if not shown:
        return
    figure = Figure(
        figsize=(2 + 4 * len(shown), 1.5 + 0.35 * len(names)), layout='constrained'
    )
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, (key, (title, unit)) in zip(axes, shown.items()):
        values = np.array([[known[n, s][key] for s in severities] for n in names])
        clean = summary['clean'][key]
        # No colour is so dark that black figures cannot be read.
        axis.imshow(values, cmap='Blues', vmin=0, vmax=2 * clean or 1, aspect='auto')
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, f'{unit * value:.1f}', ha='center', va='center')
        axis.set_xticks(range(len(severities)), severities)
        axis.set_yticks(range(len(names)), [n.replace('_', ' ') for n in names])
        axis.set(title=f'{title}, clean {unit * clean:.1f}', xlabel='severity')
    figure.savefig(path, dpi=110)
