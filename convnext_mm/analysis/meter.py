"""Time and memory of things that take turns."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Step(NamedTuple):
    """What is measured, and what cleans up after it and is not."""

    run: Callable[[], object]
    reset: Callable[[], object] = lambda: None


class Meter:
    """One device, one clock.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        clock: ``'wall'``, or ``'cpu'``: time that this process computes.
    """

    def __init__(self, device: str, clock: str = 'wall') -> None:
        self.device, self.clock = device, clock

    def now(self) -> float:
        """Seconds, once the device has done all that it was asked."""
        if self.device == 'cuda':
            torch.cuda.synchronize()
        return time.process_time() if self.clock == 'cpu' else time.perf_counter()

    def times(
        self, steps: dict[str, Step], rounds: int, warmup: int
    ) -> dict[str, dict]:
        """Rounds in which each step has one turn, after some to warm up.

        Returns:
            Name to median, quartiles and all of the times in ms.
        """
        times: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(-warmup, rounds):
            for name, step in steps.items():
                start = self.now()
                step.run()
                elapsed = 1e3 * (self.now() - start)
                step.reset()
                if index >= 0:
                    times[name].append(elapsed)
        return {name: summary(values) for name, values in times.items()}

    def peak(self, step: Step, own_bytes: int) -> int:
        """Peak of allocated CUDA memory in a step, in bytes: what it allocates
        and what its network owns, not what the others do."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run()
        step.reset()
        return torch.cuda.max_memory_allocated() - before + own_bytes


def summary(times: list[float]) -> dict:
    low, _, high = statistics.quantiles(times, n=4, method='inclusive')
    return dict(
        median_ms=statistics.median(times), quartiles_ms=[low, high], times_ms=times
    )


def own_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """Bytes that hooks see saved for backward in ``run``, each memory block
    once, those of parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = run()
    del outs
    return sum(sizes.values())
