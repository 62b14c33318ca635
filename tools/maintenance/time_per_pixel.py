"""Measures what a pixel costs on this CPU, from small images to large ones and from
one to eight at a time: ConvNeXt-T in fp32, a train step and inference, plain PyTorch
beside what ``impl='auto'`` is. With --plot draws such results into one picture.

Every time is divided by that of ``REFERENCE`` with the same network just before it, as
a machine's clock changes within minutes. What needs more memory than is free is left
out, and named."""

import argparse
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.progress import track

from convnext_mm import ConvNeXt
from convnext_mm.analysis import machine
from convnext_mm.apis.benchmark.plot import OURS_COLOUR, PEER_COLOUR

SIZES = ((224, 224), (320, 320), (512, 512), (800, 1333))
BATCHES = (1, 2, 4, 8)
REFERENCE = (2, 256, 256)
LARGE = 2_000_000  # pixels: above, every second round is enough
AIM = 0.15  # how far from flat
# Bytes for each pixel that a step of ConvNeXt-T has at its peak, rounded up.
PEAK = {('train', 'eager'): 2800, ('train', 'auto'): 1500, ('infer', ''): 400}
NETWORKS = dict(train=('eager', 'auto'), infer=('eager', 'auto+deploy'))

Shape = tuple[int, int, int]


class Case(NamedTuple):
    mode: str
    network: str
    shape: Shape

    @property
    def pixels(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        known = PEAK.get((self.mode, self.network), PEAK['infer', ''])
        return known * self.pixels


def build(network: str) -> ConvNeXt:
    impl, _, deploy = network.partition('+')
    torch.manual_seed(0)
    model = ConvNeXt('tiny', impl=impl)
    return model.switch_to_deploy() if deploy else model


def seconds(model: ConvNeXt, mode: str, shape: Shape) -> float:
    n, height, width = shape
    x = torch.rand(n, 3, height, width)
    start = time.perf_counter()
    with torch.set_grad_enabled(mode == 'train'):
        outs = model(x)
        if mode == 'train':
            torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    return time.perf_counter() - start


def turns(cases: list[Case], rounds: int) -> Iterator[Case]:
    for number in range(rounds):
        yield from (c for c in cases if c.pixels < LARGE or number % 2 == 0)


def measure(mode: str, rounds: int, largest: int) -> tuple[list[dict], list[str]]:
    """Rows, and what was left out."""
    models = {name: build(name) for name in NETWORKS[mode]}
    cases = [
        Case(mode, name, (n, *size))
        for size in SIZES
        for n in BATCHES
        for name in models
    ]
    free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    left_out = [c for c in cases if c.bytes > free or c.pixels > largest]
    cases = [c for c in cases if c not in left_out]
    reference = {name: Case(mode, name, REFERENCE) for name in models}
    for case in reference.values():
        seconds(models[case.network], mode, case.shape)
    times: dict[Case, list[float]] = {c: [] for c in cases}
    references: dict[Case, list[float]] = {c: [] for c in cases}
    for case in track([*turns(cases, rounds)], f'{mode}, seconds a step'):
        for kept, one in ((references, reference[case.network]), (times, case)):
            took = seconds(models[case.network], mode, one.shape)
            kept[case].append(1e6 * took / one.pixels)
    rows = [
        dict(
            mode=mode,
            network=case.network,
            shape=list(case.shape),
            us_per_pixel=times[case],
            reference_us_per_pixel=references[case],
            of_reference=statistics.median(
                t / r for t, r in zip(times[case], references[case])
            ),
        )
        for case in cases
    ]
    for name in models:
        relative = [row['of_reference'] for row in rows if row['network'] == name]
        print(f'{mode} {name}: {min(relative):.3f} to {max(relative):.3f}')
    return rows, [f'{c.mode} {c.network} {c.shape}' for c in left_out]


def plot(results: list[dict], out: Path) -> None:
    panels = [(result, mode) for result in results for mode in NETWORKS]
    figure = Figure(figsize=(4.6 * 2, 3.4 * len(results)), layout='tight')
    axes = figure.subplots(len(results), 2, squeeze=False)
    for axis, (result, mode) in zip(axes.flat, panels):
        for name, colour in zip(NETWORKS[mode], (PEER_COLOUR, OURS_COLOUR)):
            rows = [
                r for r in result['rows'] if (r['mode'], r['network']) == (mode, name)
            ]
            rows.sort(key=lambda r: math.prod(r['shape']))
            # By the same machine's median clock: what the ratios are of.
            unit = statistics.median(
                t for r in rows for t in r['reference_us_per_pixel']
            )
            pixels = [math.prod(r['shape']) / 1e6 for r in rows]
            cost = [unit * r['of_reference'] for r in rows]
            axis.plot(pixels, cost, 'o-', color=colour, label=name, markersize=4)
            if name != 'eager':
                middle = (min(cost) + max(cost)) / 2
                axis.axhspan(
                    (1 - AIM) * middle, (1 + AIM) * middle, color=colour, alpha=0.1
                )
        threads = result['machine']['threads']
        axis.set_title(f'{mode}, fp32, {threads} thread{"s" * (threads > 1)}')
        axis.set_xscale('log')
        axis.set_xlabel('million pixels of a batch')
        axis.set_ylabel('us for each pixel')
        axis.set_ylim(bottom=0)
        axis.spines[['top', 'right']].set_visible(False)
        axis.legend(loc='lower left')
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, required=True, help='json file, or png')
    parser.add_argument('--modes', nargs='+', choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=4)
    parser.add_argument(
        '--largest',
        type=int,
        default=sys.maxsize,
        metavar='PIXELS',
        help='of a batch; larger ones are left out',
    )
    parser.add_argument('--plot', type=Path, nargs='+', metavar='FILE.json')
    args = parser.parse_args(argv)
    if args.plot:
        plot([json.loads(path.read_text()) for path in args.plot], args.out)
        return 0
    torch.set_num_threads(args.threads)
    result = dict(
        command=shlex.join(
            ['python', 'tools/maintenance/time_per_pixel.py', *(argv or sys.argv[1:])]
        ),
        environment={k: v for k, v in os.environ.items() if k.startswith('MALLOC_')},
        machine=machine.machine(),
        versions=machine.versions(),
        reference=list(REFERENCE),
        rows=[],
        left_out=[],
    )
    for mode in args.modes:
        rows, left_out = measure(mode, args.rounds, args.largest)
        result['rows'] += rows
        result['left_out'] += left_out
        args.out.write_text(json.dumps(result, indent=1) + '\n')
    for name in result['left_out']:
        print('left out:', name)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
