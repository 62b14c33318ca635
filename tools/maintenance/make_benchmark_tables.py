"""Writes the tables of README.md and of pages in docs/ that results in
benchmarks/ fill, between their marks; with --check only says whether they are
current (status 1 if not)."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from convnext_mm.apis.benchmark.networks import COMPILED, PEERS
from convnext_mm.apis.benchmark.plot import DTYPE_NAMES

ROOT = Path(__file__).resolve().parents[2]
OTHER_OPERATORS = "PyTorch's other operators"  # of count_work.py
MARKS = ('<!-- tools/maintenance/make_benchmark_tables.py: {} -->', '<!-- end -->')
TRAIN, SAVED, INFER = (
    'train_tiny_2x256x256',
    'saved_tiny_2x256x256',
    'infer_tiny_1x512x512',
)
# The same times on a CPU without AVX512, with today's PyTorch; in fp32 only, which
# is what such a CPU trains in.
AVX2, TWO = '_avx2', '_avx2_2threads'
MACHINES = ('', AVX2, TWO)
KEPT = '_avx2_kept'  # memory, of tools/maintenance/time_per_pixel.py
LIBRARIES = dict(
    torch='PyTorch', timm='timm', torchvision='torchvision', transformers='transformers'
)
CLOCKS = dict(wall='wall-clock time', cpu='CPU time')
LIBRARIES['onedl-mmpretrain'] = 'mmpretrain'


class Result:
    """A file that tools/benchmark.py wrote."""

    def __init__(self, name: str) -> None:
        self.content = json.loads((ROOT / 'benchmarks' / f'{name}.json').read_text())
        self.key = (
            'saved_bytes' if 'saved_bytes' in self.content['rows'][0] else 'median_ms'
        )

    def row(self, network: str, dtype: str) -> dict | None:
        for row in self.content['rows']:
            if (row['network'], row['dtype']) == (network, dtype):
                return row
        return None

    def value(self, network: str, dtype: str) -> float | None:
        """Milliseconds or bytes; None where it was not measured."""
        if network == 'floor':
            return self.row('eager', dtype)['floor_ms']
        row = self.row(network, dtype)
        return row and row[self.key]

    def best_peer(self, dtype: str, compiled: bool = True) -> float:
        names = [
            peer + how
            for peer in PEERS
            for how in (('', COMPILED) if compiled else ('',))
        ]
        return min(filter(None, (self.value(n, dtype) for n in names)))

    def shape(self) -> str:
        height, width = self.content['size']
        return f'{self.content["batch"]} x 3 x {height} x {width}'


class Claim(NamedTuple):
    """A row of the ratios: ``ours`` against another, and the project's aim."""

    what: str
    file: str
    dtype: str
    ours: str
    other: str
    aim: float

    def ratio(self, results: dict[str, Result]) -> float:
        """How many times less memory is kept, over theirs, or how many times
        faster ours is."""
        result = results[self.file]
        ours = result.value(self.ours, self.dtype)
        other = (
            result.best_peer(self.dtype, self.other == COMPILED_TOO)
            if self.other.startswith(BEST)
            else result.value(self.other, self.dtype)
        )
        return ours / other if self.file == SAVED else other / ours

    def line(self, results: dict[str, Result]) -> list[str]:
        ratio = self.ratio(results)
        if self.file == SAVED:
            against = f'over {OTHER_NAMES.get(self.other, self.other)}'
            short = ratio > self.aim * 1.005
        else:
            against = f'{self.other} over ours'
            short = ratio < self.aim
        dtype = DTYPE_NAMES.get(self.dtype, self.dtype)
        return [
            f'{self.what}, {dtype}, {against}',
            f'{ratio:.2f} x' + short * ' (short)',
            f'{self.aim:g} x',
        ]


BEST, COMPILED_TOO = 'best peer', 'best peer, compiled ones included,'
OTHER_NAMES = dict(paper="the paper's formulation")
STORED, STEP = 'saved, `{}`', 'train step, `lean`'
DEPLOYED = 'inference, `lean` after `switch_to_deploy()`'
CLAIMS = [
    Claim(STORED.format('lean'), SAVED, 'fp32', 'lean', 'paper', 0.48),
    Claim(STORED.format('lean'), SAVED, 'amp', 'lean', 'paper', 0.35),
    Claim(STORED.format('lean+'), SAVED, 'fp32', 'lean+', 'paper', 0.30),
    Claim(STORED.format('lean+'), SAVED, 'amp', 'lean+', 'paper', 0.20),
    Claim(STEP, TRAIN, 'fp32', 'lean', BEST, 1.1),
    Claim(STEP, TRAIN, 'fp32', 'lean', COMPILED_TOO, 1.1),
    Claim(STEP, TRAIN, 'fp32', 'lean', 'mmpretrain', 1.35),
    Claim(STEP, TRAIN, 'amp', 'lean', BEST, 1.25),
    Claim(STEP, TRAIN, 'amp', 'lean', COMPILED_TOO, 1.25),
    Claim(STEP, TRAIN, 'amp', 'lean', 'mmpretrain', 1.35),
    Claim(DEPLOYED, INFER, 'fp32', 'lean+deploy', BEST, 1.2),
    Claim(DEPLOYED, INFER, 'amp', 'lean+deploy', BEST, 1.9),
    Claim(DEPLOYED, INFER, 'bf16', 'lean+deploy', BEST, 1.4),
]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the heads."""
    head, *body = rows
    return '\n'.join(
        '| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *body)
    )


def measured_table(results: dict[str, Result], on: str = '') -> str:
    """What was measured, with where: of a page that says so."""
    train, saved, infer = (results[name + on] for name in (TRAIN, SAVED, INFER))
    columns = [
        ('train step fp32, ms', train, 'fp32'),
        ('bf16 autocast', train, 'amp'),
        ('saved fp32, MiB', saved, 'fp32'),
        ('bf16 autocast', saved, 'amp'),
        ('infer fp32, ms', infer, 'fp32'),
        ('bf16 autocast', infer, 'amp'),
        ('bf16', infer, 'bf16'),
    ]
    columns = [c for c in columns if c[1].row('eager', c[2])]
    networks = list(
        dict.fromkeys(
            row['network']
            for result in (infer, train)
            for row in result.content['rows']
        )
    )

    def cell(network: str, result: Result, dtype: str) -> str:
        if network == 'floor' and result is saved:
            return ''
        value = result.value(network, dtype)
        if value is None:
            return ''
        return f'{value / (2**20 if result is saved else 1):.0f}'

    rows = [['', *(head for head, *_ in columns)]]
    rows += [
        [network, *(cell(network, *column) for _, *column in columns)]
        for network in (*networks, 'floor')
    ]
    content = train.content
    loads = [
        load
        for result in (train, infer)
        for load in (
            result.content['machine']['load_average'][0],
            result.content['load_average_after'][0],
        )
    ]
    machine, versions = content['machine'], content['versions']
    return '\n'.join(
        [
            f'Machine: {machine["cpu"]}, {machine["isa"]}, '
            f'{threads(machine)}, {CLOCKS[content["clock"]]}',
            f'(load average {min(loads):.1f} to {max(loads):.1f} on '
            f'{machine["cores"]} cores);',
            ', '.join(f'{shown} {versions[name]}' for name, shown in LIBRARIES.items())
            + '.',
            f'Train step and saved bytes: {train.shape()}. Inference: {infer.shape()}.',
            '',
            markdown(rows),
        ]
    )


def threads(machine: dict) -> str:
    return f'{machine["threads"]} thread{"s" * (machine["threads"] > 1)}'


def ratio_table(results: dict[str, Result]) -> str:
    return markdown(
        [['ratio', 'measured', 'target'], *(claim.line(results) for claim in CLAIMS)]
    )


def readme_table(results: dict[str, Result]) -> str:
    """Ratios only: times of one machine say little about another, and even they
    differ between these two."""
    cases = [
        ('time of a train step', TRAIN, 'lean', ('fp32', 'amp')),
        ('time of inference, deployed', INFER, 'lean+deploy', ('fp32', 'amp')),
        ('memory kept for backward', SAVED, 'lean', ('fp32', 'amp')),
        ("the same, `impl='lean+'`", SAVED, 'lean+', ('fp32', 'amp')),
    ]
    rows = [["of mmpretrain's / of the best peer's, ConvNeXt-T", 'dtype']]
    for machine in MACHINES:
        content = results[TRAIN + machine].content
        rows[0].append(
            f'{content["machine"]["isa"]}, {threads(content["machine"])}, '
            f'PyTorch {content["versions"]["torch"]}'
        )
    for what, file, ours, dtypes in cases:
        for dtype in dtypes:
            cells = [what, DTYPE_NAMES.get(dtype, dtype)]
            for machine in MACHINES:
                result = results[file + machine]
                value = result.value(ours, dtype)
                cells.append(
                    ''
                    if value is None
                    else f'{value / result.value("mmpretrain", dtype):.0%} / '
                    f'{value / result.best_peer(dtype):.0%}'
                )
            rows.append(cells)
    return markdown(rows)


def attack_table(results: dict[str, Result], by_door: bool = True) -> str:
    """What tests/checkpoint/test_attacks.py counted: outcomes of each door, or
    of each kind of file at all doors."""
    counted = json.loads((ROOT / 'benchmarks/checkpoint_attacks.json').read_text())
    totals: dict[str, Counter] = {}
    for door, groups in counted.items():
        for group, outcomes in groups.items():
            totals.setdefault(door if by_door else group, Counter()).update(outcomes)
    totals['**all**'] = sum(totals.values(), Counter())
    rows = [
        [
            'door' if by_door else 'files',
            'tried',
            'loaded, all right',
            'refused',
            'anything else',
        ]
    ]
    for name, outcomes in totals.items():
        tried, right = sum(outcomes.values()), outcomes['right']
        refused = outcomes['refused']
        rows.append([name, *map(str, (tried, right, refused, tried - right - refused))])
    return markdown(rows)


def mutation_table(results: dict[str, Result]) -> str:
    """What became of valid files with random changes."""
    counted = json.loads((ROOT / 'benchmarks/checkpoint_mutated.json').read_text())[
        'load_checkpoint()'
    ]
    kinds = ('right', 'refused', 'other numbers')
    return markdown(
        [
            [
                'files changed',
                'loaded, all right',
                'refused',
                'other numbers, where the format cannot tell',
                'anything else',
            ],
            [
                str(sum(counted.values())),
                *(str(counted.get(k, 0)) for k in kinds),
                str(sum(n for k, n in counted.items() if k not in kinds)),
            ],
        ]
    )


def work_table(results: dict[str, Result]) -> str:
    """What the kernels of a block have to do, before and after they were made to do
    less, for compute capability 9.0."""
    work = json.loads((ROOT / 'benchmarks/kernel_work.json').read_text())
    before, after = (
        [r for r in work[when]['records'] if r['sm'] == 90]
        for when in ('before', 'after')
    )

    def cells(records: Sequence[dict], step: tuple[str, str] | None) -> list[str]:
        records = [r for r in records if step in (None, (r['direction'], r['step']))]
        ratios = [r['per_multiply_add'] for r in records if r.get('per_multiply_add')]
        depthwise = step is not None and 'depthwise' in step[1]
        return [
            f'{min(ratios):.1f}' if depthwise and ratios else '',
            f'{sum(r.get("warp_instructions", 0) for r in records) / 1e6:.0f}',
            f'{sum(r["bytes"] for r in records) / 1e6:.0f}',
            str(max((r.get('registers', 0) for r in records), default=0) or ''),
            f'{sum(r["least_us"] for r in records):.0f}',
        ]

    steps = list(dict.fromkeys((r['direction'], r['step']) for r in before + after))
    steps.sort(key=lambda step: (step[0] == 'backward', step[1] == OTHER_OPERATORS))
    rows = [
        [
            'step',
            'instructions for each multiply-add',
            'million warp instructions',
            'MB',
            'registers',
            'least time, us',
        ]
    ]
    for step in (*steps, None):
        name = f'{step[0]}: {step[1]}' if step else '**a block**'
        pairs = zip(cells(before, step), cells(after, step))
        rows.append([name, *(f'{a} → {b}' if a or b else '' for a, b in pairs)])
    return markdown(rows)


def pixel_table(results: dict[str, Result]) -> str:
    """How much a pixel's time differs with the size of images and batch."""
    rows = [['ConvNeXt-T, fp32', 'network', 'least', 'most', 'from the middle']]
    for suffix in (AVX2, TWO, KEPT):
        path = ROOT / f'benchmarks/time_per_pixel{suffix}.json'
        result = json.loads(path.read_text())
        costs: dict[tuple[str, str], list[float]] = {}
        for row in result['rows']:
            costs.setdefault((row['mode'], row['network']), []).append(
                row['of_reference']
            )
        how = threads(result['machine']) + ', memory kept' * bool(result['environment'])
        for (mode, network), found in costs.items():
            least, most = min(found), max(found)
            rows.append(
                [
                    f'{mode}, {how}',
                    network,
                    f'{least:.2f}',
                    f'{most:.2f}',
                    f'{(most - least) / (most + least):.0%}',
                ]
            )
    return markdown(rows)


TABLES: dict[str, dict[str, Callable[[dict[str, Result]], str]]] = {
    'README.md': dict(ratios=readme_table),
    'docs/performance.md': {
        'measured': measured_table,
        'measured, AVX2': partial(measured_table, on=AVX2),
        'measured, AVX2, two threads': partial(measured_table, on=TWO),
        'ratios': ratio_table,
        'work': work_table,
        'pixels': pixel_table,
    },
    'docs/checkpoints.md': {
        'attacks by door': attack_table,
        'attacks by file': partial(attack_table, by_door=False),
        'mutations': mutation_table,
    },
}


def fill(text: str, name: str, table: str, marks: tuple[str, str] = MARKS) -> str:
    """``text`` with a table between its marks.

    Raises:
        ValueError: The marks are not there exactly once.
    """
    start, end = (mark.format(name) for mark in marks)
    pattern = f'{re.escape(start)}\n.*?{re.escape(end)}'
    filled, count = re.subn(
        pattern, lambda _: f'{start}\n{table}\n{end}', text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(
            f'{count} places for the table {name!r}, one is '
            f'needed: put "{start}" and "{end}" around it'
        )
    return filled


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args(argv)
    results = {
        name + machine: Result(name + machine)
        for name in (TRAIN, SAVED, INFER)
        for machine in MACHINES
        if name != SAVED or machine != TWO
    }
    results[SAVED + TWO] = results[SAVED + AVX2]  # threads do not matter
    status = 0
    for page, tables in TABLES.items():
        path = ROOT / page
        text = filled = path.read_text()
        try:
            for name, make in tables.items():
                filled = fill(filled, name, make(results))
        except ValueError as error:
            raise SystemExit(f'error: {page}: {error}') from None
        if filled == text:
            continue
        if args.check:
            print(
                f'{page} is not current: run python '
                'tools/maintenance/make_benchmark_tables.py'
            )
            status = 1
        else:
            path.write_text(filled)
    return status


if __name__ == '__main__':
    raise SystemExit(main())
