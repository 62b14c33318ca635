"""Trains every network on the road from ResNet-50 to ConvNeXt-T, a quarter as wide,
on drawn shapes, with several seeds, and writes each run's mIoU to one json file, from
which a second start goes on; then prints mean and spread of each step, and with --plot
draws them. About an hour on two cores:

    python tools/maintenance/run_roadmap.py --out benchmarks/roadmap_shapes.json
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.apis.demo import last_metrics
from convnext_mm.apis.show.runs import read_run
from convnext_mm.apis.train import prepare
from convnext_mm.archs import ROADMAP
from convnext_mm.checkpoint.write import write_text
from convnext_mm.datasets.shapes import write_shapes
from convnext_mm.engine import launch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/roadmap/upernet_modernized-resnet50_shapes.py'
IMAGE_SIZE = 96


def distinct_steps() -> dict[str, list[str]]:
    """The first step of each network to all that have it."""
    by_network: dict[Any, list[str]] = {}
    for step, decisions in ROADMAP['resnet50'].items():
        by_network.setdefault(decisions, []).append(step)
    return {steps[0]: steps for steps in by_network.values()}


def train_one(
    step: str, seed: int, iterations: int | None, data: str, sender: Connection
) -> None:
    """Trains one network in this process and sends its mIoU in percent."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    options: dict[str, Any] = {'model.backbone.step': step, 'randomness.seed': seed}
    if iterations is not None:
        options['train_cfg.max_iters'] = options['train_cfg.val_interval'] = iterations
        options['param_scheduler.1.end'] = iterations
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the log
    with tempfile.TemporaryDirectory() as work_dir:
        cfg = prepare(
            str(CONFIG), work_dir=work_dir, data_root=data, cfg_options=options
        )
        with launch.running(cfg) as runner:
            runner.train()
        sender.send(last_metrics(read_run(work_dir), unit=1)['mIoU'])


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Trains what is missing in ``args.out``."""
    result: dict[str, Any] = dict(
        settings=dict(
            config=CONFIG.name,
            text=Config.fromfile(CONFIG).pretty_text,
            iterations=args.iterations,
        ),
        machine=machine(),
        versions=versions(),
        runs=[],
    )
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before['settings'] != result['settings']:
            raise SystemExit(
                f'error: {args.out} has runs with other settings: give another --out'
            )
        result = before
    if not (Path(args.data) / 'annotations/instances_validation.json').is_file():
        write_shapes(args.data, size=IMAGE_SIZE)
    done = {(r['step'], r['seed']) for r in result['runs']}
    wanted = [(step, seed) for seed in range(args.seeds) for step in distinct_steps()]

    context = multiprocessing.get_context('fork')  # imports take 10 seconds
    waiting = [run for run in wanted if run not in done]
    running: dict[Any, tuple[Any, Connection, dict[str, Any], float]] = {}
    while waiting or running:
        if waiting and len(running) < args.jobs:
            step, seed = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=train_one, args=(step, seed, args.iterations, args.data, sender)
            )
            process.start()
            row = dict(step=step, seed=seed)
            running[process.sentinel] = process, receiver, row, time.monotonic()
            continue
        for sentinel in wait(list(running)):
            process, receiver, row, start = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                raise SystemExit(
                    f'error: {row} ended with status {process.exitcode}, see above'
                )
            seconds = round(time.monotonic() - start, 1)
            result['runs'].append(dict(row, mIoU=receiver.recv(), seconds=seconds))
            write_text(args.out, json.dumps(result, indent=1) + '\n')
            console.print(f'{len(result["runs"])}/{len(wanted)}', result['runs'][-1])
    return result


def summary(result: dict[str, Any]) -> dict[str, tuple[float, float, int]]:
    """Step to mean, sample standard deviation and number of seeds."""
    rows = {}
    for step in distinct_steps():
        values = [r['mIoU'] for r in result['runs'] if r['step'] == step]
        if values:
            spread = statistics.stdev(values) if len(values) > 1 else float('nan')
            rows[step] = (statistics.mean(values), spread, len(values))
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """A point for each run, and the mean of each step."""
    rows = summary(result)
    figure = Figure(figsize=(9, 5), layout='tight')
    axis = figure.subplots()
    for y, (step, (mean, _, _)) in enumerate(rows.items()):
        values = [r['mIoU'] for r in result['runs'] if r['step'] == step]
        axis.plot(values, [y] * len(values), 'o', color='tab:gray', markersize=4)
        axis.plot([mean, mean], [y - 0.35, y + 0.35], color='tab:blue', linewidth=3)
    labels = [' = '.join(steps) for steps in distinct_steps().values()]
    axis.set_yticks(range(len(rows)), labels[: len(rows)])
    axis.invert_yaxis()
    axis.grid(axis='x', alpha=0.3)
    axis.set_xlabel('mIoU on held-out drawn shapes; points: seeds, lines: means')
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, required=True, help='json to write')
    parser.add_argument('--data', default='data/shapes-96', help='drawn if missing')
    parser.add_argument('--seeds', type=int, default=3, help='of each step (3)')
    parser.add_argument('--jobs', type=int, default=2, help='at a time (2)')
    parser.add_argument('--iterations', type=int, help='others than the config has')
    parser.add_argument('--plot', type=Path, metavar='FILE.png', help='draw this')
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1 or (args.iterations or 51) < 51:
        parser.error('--seeds and --jobs are at least 1, --iterations 51')
    console = Console(soft_wrap=True)
    result = run(args, console)
    table = Table('step', 'mIoU', 'std', 'seeds')
    for step, (mean, spread, count) in summary(result).items():
        table.add_row(step, f'{mean:.1f}', f'{spread:.1f}', str(count))
    console.print(table)
    if args.plot:
        draw(result, args.plot)


if __name__ == '__main__':
    main()
