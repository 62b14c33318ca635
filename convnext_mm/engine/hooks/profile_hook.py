"""A hook that profiles some training steps and then ends training."""

import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, is_main_process
from mmengine.hooks import ProfilerHook
from mmengine.runner import Runner

from convnext_mm.engine.errors import ConfigError
from convnext_mm.registry import HOOKS

# Steps before recording: a GPU's first ones pick convolution algorithms,
# compile kernels and fill the allocator's cache.
WARMUP_STEPS = {'cuda': 10, 'cpu': 2}
PRINTED_ROWS = 25


class ProfileFinished(Exception):
    """The steps to profile are over and their files written."""


class StepProfilerHook(ProfilerHook):
    """Profiles training steps after some for warm-up, then raises
    :class:`ProfileFinished`.

    MMEngine's hook writes one trace for all processes and lets training go on.
    This one writes, for each process, to ``profile`` in the work folder:
    ``rankN_trace.json.gz`` (for chrome://tracing or ui.perfetto.dev) and
    ``rankN_costs.txt``, PyTorch's table of operators, the costliest first.

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
                print(self._table)
                print(
                    f'Profiled {self.steps} step(s); traces and tables are '
                    f'in {self._folder}'
                )
            raise ProfileFinished

    def _synchronise(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def _write(self, profiler: torch.profiler.profile) -> None:
        path = str(self._folder / f'rank{get_rank()}')
        profiler.export_chrome_trace(f'{path}_trace.json.gz')
        head = (
            f'{self.steps} training steps on {self.device}, {self._step_ms:.1f} ms '
            'each under the profiler; the operators of all together:\n'
        )
        # What an operator costs itself, without those that it calls.
        self._table = head + profiler.key_averages().table(
            sort_by=f'self_{self.device}_time_total', row_limit=PRINTED_ROWS
        )
        Path(f'{path}_costs.txt').write_text(self._table)


HOOKS.register_module(module=StepProfilerHook)
