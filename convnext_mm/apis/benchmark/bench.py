"""What is timed side by side, and what a result file holds."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from convnext_mm.analysis.floor import Rates, backbone_cost
from convnext_mm.analysis.machine import machine, versions
from convnext_mm.analysis.meter import Meter, Step, own_bytes, saved_bytes
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import ConvNeXt
from convnext_mm.private_names import has

from .networks import (
    COMPILED,
    DEPLOY,
    OURS,
    PEER_MODULES,
    PEERS,
    build,
    difference,
    one_line,
)

if TYPE_CHECKING:
    from .models import Training

BACKBONE_MODES = ('infer', 'train', 'memory')
MODEL_MODES = ('detector', 'segmentor')
SIZES = dict(detector=(800, 1344), segmentor=(512, 512))  # others: 256 x 256


class Precision(NamedTuple):
    """The parameters' dtype and autocast's."""

    parameters: torch.dtype
    autocast: torch.dtype | None = None

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
COMPILED_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


def check_names(option: str, known: Collection[str], names: Sequence[str]) -> None:
    """Refuses what is not known, with what is close to it."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f'--{option} {name}: there are {", ".join(known)}'
                + (f'; did you mean {" or ".join(close)}?' if close else '')
            )


@dataclasses.dataclass
class Running:
    """On what, and how often. The fields are options of ``convnext-mm bench``."""

    rounds: int = 5
    warmup: int = -1
    device: str = 'cpu'
    clock: str = 'wall'
    threads: int = 1

    def __post_init__(self) -> None:
        if self.clock == 'cpu' and (self.threads != 1 or self.device != 'cpu'):
            raise ConfigError('--clock cpu needs --threads 1 and --device cpu')
        if self.rounds < 2:
            raise ConfigError(f'--rounds must be at least 2, not {self.rounds}')
        if self.threads < 1:
            raise ConfigError(f'--threads must be at least 1, not {self.threads}')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ConfigError('--device cuda: PyTorch sees no GPU here; leave it out')
        if self.warmup < 0:
            self.warmup = 3 if self.device == 'cuda' else 1


@dataclasses.dataclass
class Settings(Running):
    """What to measure. The fields are the options of ``convnext-mm bench``; what
    is empty, or -1, is chosen by mode and device.

    Raises:
        ConfigError: What does not go together.
    """

    mode: Sequence[str] = BACKBONE_MODES
    dtype: Sequence[str] = ()
    arch: str = 'tiny'
    batch: int = 2
    size: Sequence[int] = ()
    networks: Sequence[str] | None = None
    compile: Sequence[str] = ()
    compile_backend: str = 'inductor'
    fit_gib: Sequence[float] = ()

    @property
    def whole(self) -> bool:
        """Whether whole models are measured, not backbones."""
        return self.mode[0] in MODEL_MODES

    def __post_init__(self) -> None:
        check_names('mode', (*BACKBONE_MODES, *MODEL_MODES), self.mode)
        check_names('dtype', DTYPES, self.dtype)
        known = (*PEERS, *OURS)
        check_names('networks', known, self.networks or ())
        check_names('compile', known, self.compile)
        super().__post_init__()
        if len(self.mode) > 1 and set(self.mode) & set(MODEL_MODES):
            raise ConfigError(
                f'--mode {" ".join(self.mode)}: detector and segmentor run '
                'alone; give each a run of its own'
            )
        if self.whole:
            self._check_whole()
        elif self.fit_gib:
            raise ConfigError('--fit-gib is for --mode detector or segmentor')
        self.size = self.size or SIZES.get(self.mode[0], (256, 256))
        self.dtype = self.dtype or (['fp32'] if self.whole else ['fp32', 'amp', 'bf16'])

    def _check_whole(self) -> None:
        for dtype in self.dtype:
            if DTYPES[dtype].parameters != torch.float32:
                raise ConfigError(
                    f'--dtype {dtype}: whole models are trained with fp32 '
                    'weights; take fp32, amp or amp-fp16'
                )
        for name in self.networks or ():
            if name.endswith(DEPLOY) or (name in PEERS and name != 'mmpretrain'):
                raise ConfigError(
                    f'--networks {name}: whole models have one of this '
                    "package's implementations or mmpretrain"
                )
        if self.compile:
            raise ConfigError('--compile is for backbones')
        if self.fit_gib and self.device != 'cuda':
            raise ConfigError('--fit-gib needs --device cuda')


class BackboneBench:
    """Backbones on one image batch."""

    def __init__(self, settings: Settings, meter: Meter, rates: Rates) -> None:
        self.settings, self.meter, self.rates = settings, meter, rates
        names = settings.networks or [*PEERS, *_default_ours(settings.device)]
        self.networks, self.skipped = build(names, settings.arch, settings.device)
        with torch.device('meta'):
            self.parameters = sum(
                p.numel() for p in ConvNeXt(settings.arch).parameters()
            )
        self.x = torch.rand(settings.batch, 3, *settings.size, device=settings.device)
        self.costs: dict[str, dict] = {}

    def rows(self) -> Iterator[list[dict]]:
        """Of one dtype and mode after another."""
        for dtype in sorted(self.settings.dtype, key=list(DTYPES).index):
            for network in self.networks.values():
                network.to(DTYPES[dtype].parameters)
            for mode in self.settings.mode:
                names = [
                    n
                    for n in self.networks
                    if mode == 'infer' or not n.endswith(DEPLOY)
                ]
                measure = self._saved if mode == 'memory' else self._timed
                yield [
                    dict(network=name, mode=mode, dtype=dtype, **row)
                    for name, row in measure(names, mode, dtype).items()
                ]

    def _forward(self, network: nn.Module, dtype: str) -> list[Tensor]:
        precision = DTYPES[dtype]
        with torch.autocast(
            self.settings.device,
            precision.autocast,
            enabled=precision.autocast is not None,
        ):
            return network(self.x.to(precision.parameters))

    def _saved(self, names: list[str], mode: str, dtype: str) -> dict[str, dict]:
        return {
            name: dict(
                saved_bytes=saved_bytes(
                    functools.partial(
                        self._forward, self.networks[name].train(), dtype
                    ),
                    self.networks[name],
                )
            )
            for name in names
        }

    def _timed(self, names: list[str], mode: str, dtype: str) -> dict[str, dict]:
        networks = {name: self.networks[name].train(mode == 'train') for name in names}
        networks.update(self._compiled(networks, mode, dtype))
        steps = {
            name: self._step(network, mode, dtype) for name, network in networks.items()
        }
        rows = self.meter.times(steps, self.settings.rounds, self.settings.warmup)
        compute = DTYPES[dtype].compute
        cost = backbone_cost(
            self.settings.arch,
            self.settings.batch,
            self.settings.size,
            mode,
            compute.itemsize,
        )
        self.costs[f'{mode}, {dtype}'] = dict(
            parameters=self.parameters, **cost._asdict()
        )
        floor = self.rates.floor_ms(cost.matrix_flops, cost.least_bytes, compute)
        for name, row in rows.items():
            row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if self.settings.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(
                    steps[name], own_bytes(networks[name])
                )
        return rows

    def _step(self, network: nn.Module, mode: str, dtype: str) -> Step:
        if mode == 'infer':

            @torch.no_grad()
            def infer() -> None:
                self._forward(network, dtype)

            return Step(infer)
        # A constant would be no gradient at all behind a LayerNorm, and
        # products of zeros need less power, so that a GPU's clock stays high.
        grads = [torch.randn_like(y.detach()) for y in self._forward(network, dtype)]

        def train() -> None:
            torch.autograd.backward(self._forward(network, dtype), grads)

        return Step(train, lambda: network.zero_grad(set_to_none=True))

    def _compiled(
        self, networks: dict[str, nn.Module], mode: str, dtype: str
    ) -> dict[str, nn.Module]:
        """Those that ``--compile`` names, compiled, run once and checked; one
        that fails is skipped."""
        compiled = {}
        for name in self.settings.compile:
            if name not in networks:
                continue
            network: Any = torch.compile(
                copy.deepcopy(networks[name]),
                dynamic=False,
                backend=self.settings.compile_backend,
            )
            try:
                with torch.set_grad_enabled(mode == 'train'):
                    error = difference(
                        self._forward(networks[name], dtype),
                        self._forward(network, dtype),
                    )
                self._step(network, mode, dtype).run()  # compiles backward
                network.zero_grad(set_to_none=True)
            except Exception as reason:  # whatever a compiler may raise
                message = one_line(reason)
            else:
                allowed = COMPILED_TOLERANCE[DTYPES[dtype].compute]
                if error < allowed:
                    compiled[name + COMPILED] = network
                    continue
                message = (
                    f'differs by {error:.1e} of the largest value from '
                    f'the same network before, more than {allowed}'
                )
            self.skipped[f'{name}{COMPILED}, {mode}, {dtype}'] = message
        return compiled


class ModelBench:
    """Whole models of one task, this package's backbone and mmpretrain's."""

    def __init__(self, settings: Settings, meter: Meter, rates: Rates) -> None:
        # The backbone is measured where MMDetection is missing, too.
        from . import models

        self.settings, self.meter, self.rates = settings, meter, rates
        self.models, self.task = models, settings.mode[0]
        self.names = list(settings.networks or ['auto', 'mmpretrain'])
        self.costs: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        if 'mmpretrain' in self.names:
            try:
                importlib.import_module(PEER_MODULES['mmpretrain'])
            except Exception as reason:  # that of what it imports, too
                self.skipped['mmpretrain'] = one_line(reason)
                self.names.remove('mmpretrain')

    def rows(self) -> Iterator[list[dict]]:
        """Of one dtype and model after another."""
        for dtype in self.settings.dtype:
            training = self._training(self.names, dtype)
            training.check_equal()
            timed = self._timed(training, dtype)
            del training
            for name, row in timed.items():
                if self.settings.fit_gib:
                    row['largest_batch'] = self._fit(name, dtype)
                yield [dict(network=name, mode=self.task, dtype=dtype, **row)]

    def _training(self, names: list[str], dtype: str) -> Training:
        return self.models.Training(
            self.task,
            names,
            self.settings.arch,
            self.settings.batch,
            self.settings.size,
            dtype,
            self.settings.device,
        )

    def _timed(self, training: Training, dtype: str) -> dict[str, dict]:
        steps = {name: training.step(name) for name in training.models}
        rows = self.meter.times(steps, self.settings.rounds, self.settings.warmup)
        compute = DTYPES[dtype].compute
        least_bytes = backbone_cost(
            self.settings.arch,
            self.settings.batch,
            self.settings.size,
            'train',
            compute.itemsize,
        ).least_bytes
        flops = training.flops()
        floor = self.rates.floor_ms(flops, least_bytes, compute)
        model = next(iter(training.models.values()))
        self.costs[f'{self.task}, {dtype}'] = dict(
            parameters=sum(p.numel() for p in model.parameters()),
            matrix_flops=flops,
            least_bytes=least_bytes,
        )
        for name, row in rows.items():
            row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if self.settings.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(
                    steps[name], training.own_bytes(name)
                )
        return rows

    def _fit(self, name: str, dtype: str) -> dict[str, int]:
        """GiB to the largest batch; with nothing else on the device."""
        from .capacity import largest_training_batch

        training = self._training([name], dtype)
        return {
            f'{gib:g}': largest_training_batch(training, name, gib)
            for gib in self.settings.fit_gib
        }


def _default_ours(device: str) -> list[str]:
    """Ours that run on a device, without ``auto``, which is one of them."""
    return [
        name
        for name in OURS
        if name != 'auto' and (device == 'cuda' or not name.startswith('triton'))
    ]


def run(settings: Settings, out: Path, command: str) -> dict:
    """Measures, writing ``out`` after each dtype, mode or model: whoever ends
    it early has what was measured.

    Args:
        settings: What to measure.
        out: The json file.
        command: That repeats it, for the file.

    Returns:
        What the file holds.

    Raises:
        ValueError: Two networks differ that must not.
    """
    torch.set_num_threads(settings.threads)
    # Each compiled network is one more version of the same few functions.
    if has('torch._dynamo.config.recompile_limit'):
        torch._dynamo.config.recompile_limit = 64
    meter = Meter(settings.device, settings.clock)
    rates = Rates(settings.device, meter.now)
    result: dict[str, Any] = dict(
        command=command,
        machine=machine(settings.device),
        versions=versions(),
        clock=settings.clock,
        arch=settings.arch,
        batch=settings.batch,
        rows=[],
    )
    kind: type[ModelBench | BackboneBench]
    kind = ModelBench if settings.whole else BackboneBench
    bench = kind(settings, meter, rates)
    result['skipped'] = bench.skipped
    for measured in bench.rows():
        result['rows'] += measured
        result.update(
            load_average_after=os.getloadavg(),
            size=list(settings.size),
            costs=bench.costs,
            rates=rates.measured(),
        )
        out.write_text(json.dumps(result, indent=1) + '\n')
    return result
