"""What is timed side by side, and what a result file holds."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convnext_mm.analysis.floor import Rates, backbone_cost
from convnext_mm.analysis.machine import machine, versions
from convnext_mm.analysis.meter import Meter, Step, own_bytes, saved_bytes
from convnext_mm.checkpoint.write import write_text
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import ConvNeXt
from convnext_mm.private_names import has

from .capacity import Trial, free_cache, largest_training_batch
from .networks import (
    COMPILED,
    DEPLOY,
    OTHERS,
    OURS,
    PEER_MODULES,
    PEERS,
    build,
    check_close,
    check_what_ran,
    one_line,
    what_runs,
)

BACKBONE_MODES = ('infer', 'train', 'memory')
INFER = '-infer'
TRAIN_MODES = ('detector', 'cascade', 'segmentor')
MODEL_MODES = (*TRAIN_MODES, *(mode + INFER for mode in TRAIN_MODES))
# Others: 256 x 256. In inference what the papers count FLOPs with.
SIZES = {
    'detector': (800, 1344),
    'cascade': (800, 1344),
    'segmentor': (512, 512),
    'detector-infer': (800, 1280),
    'cascade-infer': (800, 1280),
    'segmentor-infer': (512, 2048),
}


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
        check_names('networks', (*known, *OTHERS), self.networks or ())
        check_names('compile', known, self.compile)
        super().__post_init__()
        if len(self.mode) > 1 and set(self.mode) & set(MODEL_MODES):
            raise ConfigError(
                f'--mode {" ".join(self.mode)}: modes of whole models run '
                'alone; give each a run of its own'
            )
        if self.fit_gib and self.device != 'cuda':
            raise ConfigError('--fit-gib needs --device cuda')
        if self.whole:
            self._check_whole()
        elif other := next((n for n in self.networks or () if n in OTHERS), None):
            raise ConfigError(f'--networks {other}: is for whole models')
        elif self.fit_gib and 'train' not in self.mode:
            raise ConfigError('--fit-gib is for training')
        self.size = self.size or SIZES.get(self.mode[0], (256, 256))
        self.dtype = self.dtype or (['fp32'] if self.whole else ['fp32', 'amp', 'bf16'])

    def _check_whole(self) -> None:
        infer = self.mode[0].endswith(INFER)
        for dtype in self.dtype:
            if DTYPES[dtype].parameters != torch.float32:
                raise ConfigError(
                    f'--dtype {dtype}: whole models have fp32 '
                    'weights; take fp32, amp or amp-fp16'
                )
        for name in self.networks or ():
            if name in PEERS and name not in ('mmpretrain', 'paper'):
                raise ConfigError(
                    f"--networks {name}: whole models have one of this package's "
                    f'implementations, paper, mmpretrain, {" or ".join(OTHERS)}'
                )
            if name.endswith(DEPLOY) and not infer:
                raise ConfigError(f'--networks {name}: is for inference')
        if self.compile:
            raise ConfigError('--compile is for backbones')
        if self.fit_gib and infer:
            raise ConfigError('--fit-gib is for training')


class Bench:
    """Rows of one kind, added as they are measured.

    Attributes:
        rows: By network, mode and dtype.
        costs: FLOPs and bytes, by mode and dtype.
        skipped: What has no row, and in one sentence each why.
        running: What is being tried: who reads the file after a crash knows.
    """

    def __init__(
        self, settings: Settings, meter: Meter, rates: Rates, save: Callable[[], None]
    ) -> None:
        self.settings, self.meter, self.rates, self.save = settings, meter, rates, save
        self.rows: dict[tuple[str, str, str], dict] = {}
        self.costs: dict[str, dict] = {}
        self.skipped: dict[str, str] = {}
        self.running: str | None = None

    def begin(self, name: str) -> None:
        self.running = name
        self.save()

    def add(self, rows: dict[str, dict], mode: str, dtype: str) -> None:
        for name, row in rows.items():
            facts = dict(network=name, mode=mode, dtype=dtype)
            self.rows[name, mode, dtype] = dict(facts, **row)
        self.save()

    def skip(self, name: str, mode: str, dtype: str, reason: Exception) -> None:
        self.skipped[f'{name}, {mode}, {dtype}'] = one_line(reason)
        free_cache()
        self.meter.now()  # raises where the device is of no use any more

    def times(
        self,
        names: Sequence[str],
        mode: str,
        dtype: str,
        prepare: Callable[[str], tuple[Step, dict]],
        finish: Callable[[str, Step, dict], None],
    ) -> None:
        """Tries each network, then lets those that passed take turns.

        Args:
            prepare: Of a name, runs a step once, raises where it is wrong, and returns
                it and what its row says of it.
            finish: Adds to a row what is not a time.
        """
        steps: dict[str, Step] = {}
        facts: dict[str, dict] = {}
        for name in names:
            self.begin(f'{name}, {mode}, {dtype}')
            try:
                steps[name], facts[name] = prepare(name)
                if self.settings.device == 'cuda':  # has a time, should the next crash
                    first = self._times({name: steps[name]}, facts, finish, rounds=3)
                    self.add(first, mode, dtype)
            except Exception as reason:  # whatever a compiler or driver may raise
                self.skip(name, mode, dtype, reason)
                steps.pop(name, None)
        self.begin(f'{mode}, {dtype}')
        rounds = self.settings.rounds
        self.add(self._times(steps, facts, finish, rounds), mode, dtype)

    def _times(
        self, steps: dict[str, Step], facts: dict, finish: Callable, rounds: int
    ) -> dict[str, dict]:
        rows = self.meter.times(steps, rounds, self.settings.warmup)
        for name, row in rows.items():
            row.update(facts[name])
            finish(name, steps[name], row)
        return rows

    def fit(
        self, name: str, mode: str, dtype: str, step: Callable[[int], object]
    ) -> None:
        """The largest batches; each trial is in the row at once.

        Args:
            step: See :func:`.capacity.largest_training_batch`.
        """
        row = self.rows[name, mode, dtype]
        self.begin(f'{name}, {mode}, {dtype}')
        row.update(largest_batch={}, trials={})
        for gib in self.settings.fit_gib:
            trials: list[dict] = []
            row['trials'][f'{gib:g}'] = trials

            def tried(trial: Trial, trials: list = trials) -> None:
                trials.append(trial._asdict())
                self.save()

            try:
                found = largest_training_batch(step, gib, tried)
            except torch.cuda.OutOfMemoryError:  # the first two batches
                found = 0
            except Exception as reason:  # whatever a driver may raise
                found = None
                self.skip(f'{name} in {gib:g} GiB', mode, dtype, reason)
            if found is not None:
                row['largest_batch'][f'{gib:g}'] = found
            self.save()


class BackboneBench(Bench):
    """Backbones on one image batch."""

    def measure(self) -> None:
        """One dtype and mode after another."""
        settings = self.settings
        names = settings.networks or [*PEERS, *_default_ours(settings.device)]
        self.networks, skipped, self.plain = build(
            names, settings.arch, settings.device, self.begin
        )
        self.skipped.update(skipped)
        with torch.device('meta'):
            self.parameters = sum(
                p.numel() for p in ConvNeXt(settings.arch).parameters()
            )
        self.x = self._images(settings.batch)
        for dtype in sorted(settings.dtype, key=list(DTYPES).index):
            for network in (*self.networks.values(), self.plain):
                network.to(DTYPES[dtype].parameters)
            for mode in settings.mode:
                names = [
                    n
                    for n in self.networks
                    if mode == 'infer' or not n.endswith(DEPLOY)
                ]
                if mode == 'memory':
                    for name in names:
                        self._saved(name, dtype)
                else:
                    self._timed(names, mode, dtype)

    def _forward(self, network: nn.Module, dtype: str) -> list[Tensor]:
        precision = DTYPES[dtype]
        with torch.autocast(
            self.settings.device,
            precision.autocast,
            enabled=precision.autocast is not None,
        ):
            return network(self.x.to(precision.parameters))

    def _saved(self, name: str, dtype: str) -> None:
        self.begin(f'{name}, memory, {dtype}')
        network = self.networks[name].train()
        forward = functools.partial(self._forward, network, dtype)
        found: list[int] = []
        try:
            ran = what_runs(lambda: found.append(saved_bytes(forward, network)))
            check_what_ran(name, network, ran)
        except Exception as reason:  # whatever a driver may raise
            self.skip(name, 'memory', dtype, reason)
        else:
            row = dict(saved_bytes=found[0], **ran._asdict())
            self.add({name: row}, 'memory', dtype)

    def _timed(self, names: list[str], mode: str, dtype: str) -> None:
        settings, compute = self.settings, DTYPES[dtype].compute
        cost = backbone_cost(
            settings.arch, settings.batch, settings.size, mode, compute.itemsize
        )
        self.costs[f'{mode}, {dtype}'] = dict(
            parameters=self.parameters, **cost._asdict()
        )
        floor = self.rates.floor_ms(cost.matrix_flops, cost.least_bytes, compute)
        networks = {name: self.networks[name].train(mode == 'train') for name in names}
        expected = self._outcome(self.plain.train(mode == 'train'), mode, dtype)

        def prepare(name: str) -> tuple[Step, dict]:
            if name not in networks:
                plain = networks[name.removesuffix(COMPILED)]
                networks[name] = self._compiled(plain)
                self._outcome(networks[name], mode, dtype)  # compiles
            network, outcome = networks[name], []
            ran = what_runs(lambda: outcome.extend(self._outcome(network, mode, dtype)))
            error = check_close(name, expected, outcome, compute)
            check_what_ran(name, network, ran)
            step = self._step(network, mode, dtype)
            return step, dict(difference=error, **ran._asdict())

        def finish(name: str, step: Step, row: dict) -> None:
            row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if settings.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(step, own_bytes(networks[name]))

        compiled = [name + COMPILED for name in settings.compile if name in networks]
        self.times([*names, *compiled], mode, dtype, prepare, finish)
        if mode == 'train' and settings.fit_gib:
            for name in names:
                if (name, mode, dtype) in self.rows:
                    self._fit(name, dtype)

    def _fit(self, name: str, dtype: str) -> None:
        """With nothing else on the device."""
        for other in (*self.networks.values(), self.plain):
            other.to('cpu')
        network = self.networks[name].to(self.settings.device)

        def step(batch: int) -> None:
            if len(self.x) != batch:
                self.x = self._images(batch)
            try:
                self._step(network, 'train', dtype).run()
            finally:
                network.zero_grad(set_to_none=True)

        self.fit(name, 'train', dtype, step)
        for other in (*self.networks.values(), self.plain):
            other.to(self.settings.device)
        self.x = self._images(self.settings.batch)

    def _images(self, batch: int) -> Tensor:
        return torch.rand(batch, 3, *self.settings.size, device=self.settings.device)

    def _outcome(self, network: nn.Module, mode: str, dtype: str) -> list[Tensor]:
        """Maps, and of a train step the norm of all gradients."""
        with torch.set_grad_enabled(mode == 'train'):
            maps = self._forward(network, dtype)
        if mode == 'infer':
            return list(maps)
        source = torch.Generator(self.settings.device).manual_seed(0)
        torch.autograd.backward(
            maps,
            [
                torch.randn(y.shape, generator=source, device=y.device).to(y.dtype)
                for y in maps
            ],
        )
        norms = [
            p.grad.norm().float() for p in network.parameters() if p.grad is not None
        ]
        network.zero_grad(set_to_none=True)
        return [*(y.detach() for y in maps), torch.stack(norms).norm()]

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

    def _compiled(self, network: nn.Module) -> nn.Module:
        compiled: Any = torch.compile(
            copy.deepcopy(network), dynamic=False, backend=self.settings.compile_backend
        )
        return compiled


class ModelBench(Bench):
    """Whole models of one task, this package's backbone and others'."""

    def measure(self) -> None:
        """One dtype after another."""
        settings = self.settings
        self.names = list(settings.networks or ['auto', 'mmpretrain'])
        if 'mmpretrain' in self.names:
            try:
                importlib.import_module(PEER_MODULES['mmpretrain'])
            except Exception as reason:  # that of what it imports, too
                self.skipped['mmpretrain'] = one_line(reason)
                self.names.remove('mmpretrain')
        # The backbone is measured where MMDetection is missing, too.
        from .detectors import Inference
        from .models import Training

        mode = settings.mode[0]
        self.kind = Inference if mode.endswith(INFER) else Training
        for dtype in settings.dtype:
            self._timed(self._models(self.names, dtype), mode, dtype)
            for name in self.names if settings.fit_gib else ():
                free_cache()
                if (name, mode, dtype) in self.rows:
                    training = self._models([name], dtype)
                    self.fit(
                        name, mode, dtype, functools.partial(training.step_of, name)
                    )
                    del training

    def _models(self, names: list[str], dtype: str) -> Any:
        return self.kind(
            self.settings.mode[0].removesuffix(INFER),
            names,
            self.settings.arch,
            self.settings.batch,
            self.settings.size,
            dtype,
            self.settings.device,
        )

    def _timed(self, models: Any, mode: str, dtype: str) -> None:
        settings, autocast = self.settings, DTYPES[dtype].autocast
        infer = mode.endswith(INFER)
        floor = None if infer else self._floor(models, mode, dtype)

        def prepare(name: str) -> tuple[Step, dict]:
            models.check(name)
            model, facts = models.models[name], {}
            if autocast is not None and name not in OTHERS:
                maps = models.maps(name), models.maps(name, autocast)
                facts['difference'] = check_close(name, *maps, autocast)
            step = models.step(name, autocast) if infer else models.step(name)
            ran = what_runs(step.run)
            step.reset()
            check_what_ran(name, model.backbone, ran)
            if not all(p.isfinite().all() for p in model.parameters()):
                raise ArithmeticError(f'{name}: a weight is not finite after one step')
            return step, dict(facts, **ran._asdict())

        def finish(name: str, step: Step, row: dict) -> None:
            row['images_per_s'] = 1e3 * settings.batch / row['median_ms']
            if floor is not None:
                row.update(floor_ms=floor, share_of_floor=floor / row['median_ms'])
            if settings.device == 'cuda':
                row['peak_bytes'] = self.meter.peak(step, models.own_bytes(name))

        self.times(list(models.models), mode, dtype, prepare, finish)

    def _floor(self, training: Any, mode: str, dtype: str) -> float:
        settings, compute = self.settings, DTYPES[dtype].compute
        cost = backbone_cost(
            settings.arch, settings.batch, settings.size, 'train', compute.itemsize
        )
        flops = training.flops()
        model = next(iter(training.models.values()))
        self.costs[f'{mode}, {dtype}'] = dict(
            parameters=sum(p.numel() for p in model.parameters()),
            matrix_flops=flops,
            least_bytes=cost.least_bytes,
        )
        return self.rates.floor_ms(flops, cost.least_bytes, compute)


def _default_ours(device: str) -> list[str]:
    """Ours that run on a device, without ``auto``, which is one of them."""
    return [
        name
        for name in OURS
        if name != 'auto' and (device == 'cuda' or not name.startswith('triton'))
    ]


def run(settings: Settings, out: Path, command: str) -> dict:
    """Measures, writing ``out`` with each row, and before what may fail: whoever
    ends it early has what was measured, and who looks at it after a crash the name of
    what was ``running``.

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
        size=list(settings.size),
    )

    def save() -> None:
        result.update(
            rows=list(bench.rows.values()),
            skipped=bench.skipped,
            running=bench.running,
            load_average_after=os.getloadavg(),
            costs=bench.costs,
            rates=rates.measured(),
        )
        write_text(out, json.dumps(result, indent=1) + '\n')

    bench = (ModelBench if settings.whole else BackboneBench)(
        settings, meter, rates, save
    )
    bench.measure()
    bench.running = None
    save()
    return result
