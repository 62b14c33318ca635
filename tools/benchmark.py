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
import copy
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from benchmarking.floor import Rates, backbone_cost
from benchmarking.meter import Meter, Step, own_bytes, saved_bytes
from benchmarking.networks import (COMPILED, DEPLOY, OURS, PEER_MODULES,
                                   PEERS, build, difference, one_line)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from convnext_mm.archs import ARCHS

BACKBONE_MODES = ('infer', 'train', 'memory')
MODEL_MODES = ('detector', 'segmentor')


class Precision(NamedTuple):
    """The parameters' dtype and autocast's."""
    parameters: torch.dtype
    autocast: Optional[torch.dtype] = None

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.parameters


# In this order: casting a network to another dtype has no way back.
DTYPES = {
    'fp32': Precision(torch.float32),
    'amp': Precision(torch.float32, torch.bfloat16),
    'amp-fp16': Precision(torch.float32, torch.float16),
    'bf16': Precision(torch.bfloat16),
    'fp16': Precision(torch.float16),
}
# What a compiled network may differ by from the same one before, of the
# largest value: operators fused in another order round otherwise.
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1,
                      torch.float16: 0.02}


class BackboneBench:
    """Backbones on one image batch."""

    def __init__(self, args: argparse.Namespace, meter: Meter,
                 rates: Rates) -> None:
        self.args, self.meter, self.rates = args, meter, rates
        names = args.networks or [*PEERS, *default_ours(args.device)]
        self.networks, self.skipped = build(names, args.arch, args.device)
        self.x = torch.rand(args.batch, 3, *args.size, device=args.device)
        self.costs: Dict[str, dict] = {}

    def rows(self) -> Iterator[List[dict]]:
        """Of one dtype and mode after another."""
        for dtype in sorted(self.args.dtype, key=list(DTYPES).index):
            for network in self.networks.values():
                network.to(DTYPES[dtype].parameters)
            for mode in self.args.mode:
                names = [n for n in self.networks
                         if mode == 'infer' or not n.endswith(DEPLOY)]
                measure = self._saved if mode == 'memory' else self._timed
                yield [dict(network=name, mode=mode, dtype=dtype, **row)
                       for name, row in measure(names, mode, dtype).items()]

    def _forward(self, network: nn.Module, dtype: str) -> List[Tensor]:
        precision = DTYPES[dtype]
        with torch.autocast(self.args.device, precision.autocast,
                            enabled=precision.autocast is not None):
            return network(self.x.to(precision.parameters))

    def _saved(self, names: List[str], mode: str,
               dtype: str) -> Dict[str, dict]:
        return {
            name: dict(saved_bytes=saved_bytes(
                lambda: self._forward(self.networks[name].train(), dtype),
                self.networks[name]))
            for name in names
        }

    def _timed(self, names: List[str], mode: str,
               dtype: str) -> Dict[str, dict]:
        networks = {name: self.networks[name].train(mode == 'train')
                    for name in names}
        networks.update(self._compiled(networks, mode, dtype))
        steps = {name: self._step(network, mode, dtype)
                 for name, network in networks.items()}
        rows = self.meter.times(steps, self.args.rounds, self.args.warmup)
        compute = DTYPES[dtype].compute
        cost = backbone_cost(self.args.arch, self.args.batch, self.args.size,
                             mode, compute.itemsize)
        self.costs[f'{mode}, {dtype}'] = cost._asdict()
        floor = self.rates.floor_ms(cost.matrix_flops, cost.least_bytes,
                                    compute)
        for name, row in rows.items():
            row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if self.args.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(steps[name],
                                                    own_bytes(networks[name]))
        return rows

    def _step(self, network: nn.Module, mode: str, dtype: str) -> Step:
        if mode == 'infer':

            @torch.no_grad()
            def infer() -> None:
                self._forward(network, dtype)

            return Step(infer)
        # A constant would be no gradient at all behind a LayerNorm, and
        # products of zeros need less power, so that a GPU's clock stays high.
        grads = [torch.randn_like(y.detach())
                 for y in self._forward(network, dtype)]

        def train() -> None:
            torch.autograd.backward(self._forward(network, dtype), grads)

        return Step(train, lambda: network.zero_grad(set_to_none=True))

    def _compiled(self, networks: Dict[str, nn.Module], mode: str,
                  dtype: str) -> Dict[str, nn.Module]:
        """Those that ``--compile`` names, compiled, run once and checked; one
        that fails is skipped."""
        compiled = {}
        for name in self.args.compile:
            if name not in networks:
                continue
            network = torch.compile(
                copy.deepcopy(networks[name]), dynamic=False,
                backend=self.args.compile_backend)
            try:
                with torch.set_grad_enabled(mode == 'train'):
                    error = difference(self._forward(networks[name], dtype),
                                       self._forward(network, dtype))
                self._step(network, mode, dtype).run()  # compiles backward
                network.zero_grad(set_to_none=True)
            except Exception as reason:  # whatever a compiler may raise
                message = one_line(reason)
            else:
                allowed = COMPILED_TOLERANCE[DTYPES[dtype].compute]
                if error < allowed:
                    compiled[name + COMPILED] = network
                    continue
                message = (f'differs by {error:.1e} of the largest value from '
                           f'the same network before, more than {allowed}')
            self.skipped[f'{name}{COMPILED}, {mode}, {dtype}'] = message
        return compiled


class ModelBench:
    """Whole models of one task, this package's backbone and mmpretrain's."""

    def __init__(self, args: argparse.Namespace, meter: Meter,
                 rates: Rates) -> None:
        # The backbone is measured where MMDetection is missing, too.
        from benchmarking import models
        self.args, self.meter, self.rates = args, meter, rates
        self.models, self.task = models, args.mode[0]
        self.names = list(args.networks or ['auto', 'mmpretrain'])
        self.costs: Dict[str, dict] = {}
        self.skipped: Dict[str, str] = {}
        if 'mmpretrain' in self.names:
            try:
                importlib.import_module(PEER_MODULES['mmpretrain'])
            except Exception as reason:  # that of what it imports, too
                self.skipped['mmpretrain'] = one_line(reason)
                self.names.remove('mmpretrain')
        self.args.size = args.size or models.SIZES[self.task]

    def rows(self) -> Iterator[List[dict]]:
        """Of one dtype and model after another."""
        for dtype in self.args.dtype:
            training = self._training(self.names, dtype)
            training.check_equal()
            timed = self._timed(training, dtype)
            del training
            for name, row in timed.items():
                if self.args.fit_gib:
                    row['largest_batch'] = self._fit(name, dtype)
                yield [dict(network=name, mode=self.task, dtype=dtype, **row)]

    def _training(self, names: List[str], dtype: str):
        return self.models.Training(
            self.task, names, self.args.arch, self.args.batch, self.args.size,
            dtype, self.args.device)

    def _timed(self, training, dtype: str) -> Dict[str, dict]:
        steps = {name: training.step(name) for name in training.models}
        rows = self.meter.times(steps, self.args.rounds, self.args.warmup)
        compute = DTYPES[dtype].compute
        least_bytes = backbone_cost(
            self.args.arch, self.args.batch, self.args.size, 'train',
            compute.itemsize).least_bytes
        flops = training.flops()
        floor = self.rates.floor_ms(flops, least_bytes, compute)
        model = next(iter(training.models.values()))
        self.costs[f'{self.task}, {dtype}'] = dict(
            parameters=sum(p.numel() for p in model.parameters()),
            matrix_flops=flops, least_bytes=least_bytes)
        for name, row in rows.items():
            row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if self.args.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(steps[name],
                                                    training.own_bytes(name))
        return rows

    def _fit(self, name: str, dtype: str) -> Dict[str, int]:
        """GiB to the largest batch; with nothing else on the device."""
        from benchmarking.capacity import largest_training_batch
        training = self._training([name], dtype)
        return {f'{gib:g}': largest_training_batch(training, name, gib)
                for gib in self.args.fit_gib}


def default_ours(device: str) -> List[str]:
    """Ours that run on a device, without ``auto``, which is one of them."""
    return [name for name in OURS if name != 'auto'
            and (device == 'cuda' or not name.startswith('triton'))]


def machine(args: argparse.Namespace) -> dict:
    """Where and with what a run was made."""
    cpu = platform.processor()
    if Path('/proc/cpuinfo').is_file():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(': ')[1] for line in lines
                    if line.startswith('model name')), cpu)
    facts = dict(
        cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        load_average=os.getloadavg(), python=platform.python_version())
    if args.device == 'cuda':
        facts['gpu'] = torch.cuda.get_device_name()
        facts['gpu_memory_bytes'] = torch.cuda.mem_get_info()[1]
    return facts


def versions() -> Dict[str, str]:
    found = {}
    for name in ('torch', 'triton', 'timm', 'torchvision', 'transformers',
                 'onedl-mmpretrain', 'mmpretrain', 'onedl-mmdetection',
                 'onedl-mmsegmentation', 'onedl-mmcv'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        '--mode', nargs='+', choices=[*BACKBONE_MODES, *MODEL_MODES],
        default=BACKBONE_MODES,
        help="default: infer train memory, of the backbone; 'detector': a\n"
        "train step of Mask R-CNN, 'segmentor': of UPerNet, one at a time")
    parser.add_argument(
        '--dtype', nargs='+', choices=DTYPES, default=['fp32', 'amp', 'bf16'],
        help="'amp': bf16 autocast of fp32 weights, 'amp-fp16': fp16's;\n"
        "whole models take these and 'fp32', and are in fp32 by default")
    parser.add_argument('--arch', choices=ARCHS, default='tiny')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'),
        help='default: 256 256; detector: 800 1344; segmentor: 512 512')
    parser.add_argument(
        '--networks', nargs='+', choices=[*PEERS, *OURS],
        help="default: all that run on the device; 'lean+deploy' is 'lean'\n"
        'after switch_to_deploy(), and takes part in inference only; whole\n'
        "models: 'auto mmpretrain'")
    parser.add_argument('--compile', nargs='+', default=[], metavar='NETWORK',
                        choices=[*PEERS, *OURS],
                        help='networks to add compiled for fixed shapes')
    parser.add_argument(
        '--compile-backend', default='inductor', metavar='NAME',
        help="of torch.compile; 'aot_eager' traces and generates no code")
    parser.add_argument(
        '--fit-gib', nargs='+', type=float, default=[], metavar='GIB',
        help='whole models: find the largest batch that trains with so much\n'
        'GPU memory')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--warmup', type=int, default=None,
                        help='rounds before (default: 1; on a GPU 3)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--clock', choices=['wall', 'cpu'], default='wall',
        help='cpu: time spent computing, for one thread on a busy machine')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', required=True, metavar='FILE.json')
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser,
               args: argparse.Namespace) -> None:
    """Refuses what does not go together, and fills in what depends."""
    if args.clock == 'cpu' and (args.threads != 1 or args.device != 'cpu'):
        parser.error('--clock cpu needs --threads 1 and --device cpu')
    if args.rounds < 2:
        parser.error(f'--rounds must be at least 2, not {args.rounds}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch sees no GPU here; leave it out')
    if args.warmup is None:
        args.warmup = 3 if args.device == 'cuda' else 1
    args.whole = args.mode[0] in MODEL_MODES
    if not args.whole:
        if args.fit_gib:
            parser.error('--fit-gib is for --mode detector or segmentor')
        args.size = args.size or (256, 256)
    if any(mode in MODEL_MODES for mode in args.mode) and len(args.mode) > 1:
        parser.error(f'--mode {" ".join(args.mode)}: detector and segmentor '
                     'run alone; give each a run of its own')
    if not args.whole:
        return
    if args.dtype == parser.get_default('dtype'):
        args.dtype = ['fp32']
    for dtype in args.dtype:
        if DTYPES[dtype].parameters != torch.float32:
            parser.error(f'--dtype {dtype}: whole models are trained with '
                         'fp32 weights; take fp32, amp or amp-fp16')
    for name in args.networks or ():
        if name.endswith(DEPLOY) or name in PEERS and name != 'mmpretrain':
            parser.error(f'--networks {name}: whole models have one of '
                         "this package's implementations or mmpretrain")
    if args.compile:
        parser.error('--compile is for backbones')
    if args.fit_gib and args.device != 'cuda':
        parser.error('--fit-gib needs --device cuda')


def print_rows(rows: List[dict], skipped: Dict[str, str]) -> None:
    columns: Dict[str, Callable[[dict], str]] = {
        'mode': lambda row: row['mode'],
        'dtype': lambda row: row['dtype'],
        'network': lambda row: row['network'],
        'ms': lambda row: f'{row["median_ms"]:.1f}',
        'floor': lambda row: f'{row["share_of_floor"]:.0%}',
        'saved, MiB': lambda row: f'{row["saved_bytes"] / 2**20:.1f}',
        'peak, MiB': lambda row: f'{row["peak_bytes"] / 2**20:.1f}',
        'largest batch': lambda row: ', '.join(
            f'{n} in {gib} GiB' for gib, n in row['largest_batch'].items()),
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
        console.print(f'skipped {name}: {reason}', markup=False,
                      highlight=False)


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    # Each compiled network is one more version of the same few functions.
    torch._dynamo.config.recompile_limit = 64
    meter = Meter(args.device, args.clock)
    rates = Rates(args.device, meter.now)
    before = machine(args)
    command = shlex.join(['python', 'tools/benchmark.py',
                          *(argv or sys.argv[1:])])
    rows = []
    try:
        bench = (ModelBench if args.whole else BackboneBench)(args, meter,
                                                              rates)
        # Written each time: whoever ends this early has what was measured.
        for measured in bench.rows():
            rows += measured
            Path(args.out).write_text(json.dumps(dict(
                command=command, machine=before,
                load_average_after=os.getloadavg(), versions=versions(),
                clock=args.clock, arch=args.arch, batch=args.batch,
                size=list(args.size), costs=bench.costs,
                rates=rates.measured(), rows=rows, skipped=bench.skipped),
                indent=1) + '\n')
    except ValueError as error:
        raise SystemExit(f'error: {error}')
    print_rows(rows, bench.skipped)
    failed = [name for name in bench.skipped if name in OURS]
    if failed:
        raise SystemExit(f'error: {", ".join(failed)} of this package did not '
                         f'run, see above; the others are in {args.out}')


if __name__ == '__main__':
    main()
