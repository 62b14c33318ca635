"""A hook that profiles some training steps and then ends training."""

import csv
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import ProfilerHook
from mmengine.runner import Runner
from torch._C._autograd import DeviceType

from convnext_mm.engine.errors import ConfigError
from convnext_mm.registry import HOOKS

# Steps before recording: a GPU's first ones pick convolution algorithms,
# compile kernels and fill the allocator's cache.
WARMUP_STEPS = {'cuda': 10, 'cpu': 2}
PRINTED_ROWS = 25
MIB = 1024**2


class ProfileFinished(Exception):
    """The steps to profile are over and their files written."""


class Cost(NamedTuple):
    """What one operator costs in a training step, on average."""

    operator: str
    share_percent: float  # of the time of all operators
    ms_per_step: float  # without the operators that it calls
    calls_per_step: float
    allocated_mib_per_step: float  # what it took, less what it gave back


class StepProfilerHook(ProfilerHook):
    """Profiles training steps after some for warm-up, then raises
    :class:`ProfileFinished`.

    MMEngine's hook writes one trace for all processes and lets training go on.
    This one writes, for each process, to ``profile`` in the work folder:
    ``rankN_trace.json.gz`` (for chrome://tracing or ui.perfetto.dev),
    ``rankN_costs.csv`` (every operator) and ``rankN_costs.txt`` (the largest).

    Args:
        steps: Steps to profile.
        warmup: Steps before them; by default as the device needs.

    Raises:
        ValueError: ``steps`` is below 1.
    """

    def __init__(self, steps: int = 3, warmup: int | None = None) -> None:
        if steps < 1:
            raise ValueError(f'steps to profile must be at least 1, got {steps}')
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        if warmup is None:
            warmup = WARMUP_STEPS[self.device]
        self.steps, self.warmup = steps, warmup
        super().__init__(
            by_epoch=False,
            profile_times=warmup + steps,
            activity_with_cuda=self.device == 'cuda',
            schedule=dict(wait=0, warmup=warmup, active=steps, repeat=1),
            profile_memory=True,
        )

    def before_run(self, runner: Runner) -> None:
        """Starts the profiler.

        Raises:
            ConfigError: Training has too few steps.
        """
        if runner.max_iters < self.profile_times:
            raise ConfigError(
                f'profiling takes {self.warmup} steps of warm-up and '
                f'{self.steps} to record; training has {runner.max_iters}: '
                'raise train_cfg.max_iters or max_epochs, or profile fewer'
            )
        self._folder = Path(runner.work_dir) / 'profile'
        self._folder.mkdir(parents=True, exist_ok=True)
        self.on_trace_ready = self._write
        super().before_run(runner)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Advances the profiler; in the end says where the files are."""
        if runner.iter + 1 == self.warmup:  # recording starts with the next
            self._synchronise()
            self._started = time.perf_counter()
        elif runner.iter + 1 == self.profile_times:
            self._synchronise()
            elapsed = time.perf_counter() - self._started
            self._step_ms = 1e3 * elapsed / self.steps
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if self._closed:
            if is_main_process():
                print((self._folder / 'rank0_costs.txt').read_text())
                print(
                    f'Profiled {self.steps} step(s); traces and tables are '
                    f'in {self._folder}'
                )
            raise ProfileFinished

    def _synchronise(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def _write(self, profiler: torch.profiler.profile) -> None:
        rank = get_rank()
        profiler.export_chrome_trace(str(self._folder / f'rank{rank}_trace.json.gz'))
        costs = self._costs(profiler)
        with open(self._folder / f'rank{rank}_costs.csv', 'w') as file:
            writer = csv.writer(file)
            writer.writerow(Cost._fields)
            writer.writerows(costs)
        (self._folder / f'rank{rank}_costs.txt').write_text(self._table(costs))

    def _costs(self, profiler: torch.profiler.profile) -> list[Cost]:
        """Of every operator, the largest first."""
        rows = []
        for event in profiler.key_averages():
            # Kernels are counted with the operator that started them.
            if event.device_type != DeviceType.CPU:
                continue
            if self.device == 'cuda':
                time_us = event.self_device_time_total
                memory = event.self_device_memory_usage
            else:
                time_us = event.self_cpu_time_total
                memory = event.self_cpu_memory_usage
            name = event.key
            if name.startswith('ProfilerStep'):
                name = '(outside of operators)'  # Python, data loading
            rows.append((name, time_us, event.count, memory))
        total = sum(row[1] for row in rows) or 1
        rows.sort(key=lambda row: -row[1])
        return [
            Cost(
                name,
                100 * time_us / total,
                time_us / 1e3 / self.steps,
                count / self.steps,
                memory / MIB / self.steps,
            )
            for name, time_us, count, memory in rows
        ]

    def _table(self, costs: list[Cost]) -> str:
        busy_ms = sum(cost.ms_per_step for cost in costs)
        lines = [
            f'Largest costs of a training step on {self.device}, mean of '
            f'{self.steps} steps: {self._step_ms:.1f} ms (under the '
            f'profiler), {busy_ms:.1f} ms of them in the operators below.',
            f'{"operator":48} {"share":>7} {"ms":>10} {"calls":>8} {"net MiB":>10}',
        ]
        lines += [
            f'{cost.operator[:48]:48} {cost.share_percent:6.1f}% '
            f'{cost.ms_per_step:10.2f} {cost.calls_per_step:8.1f} '
            f'{cost.allocated_mib_per_step:10.1f}'
            for cost in costs[:PRINTED_ROWS]
        ]
        return '\n'.join(lines) + '\n'


HOOKS.register_module(module=StepProfilerHook)
