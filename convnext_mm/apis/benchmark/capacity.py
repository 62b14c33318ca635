"""The largest batch that a device of a given memory trains on."""

import gc
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

SEARCH_S = 30  # after which a search begins no further trial


class Trial(NamedTuple):
    """A batch, and the milliseconds of a step with it; None: out of memory."""

    batch: int
    ms: float | None


def largest_batch(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number for which ``fits`` is true, 0 if there is none; true
    for all that are smaller. Near ``guess`` it is found soonest."""
    low, high = 0, None
    batch = guess = max(1, guess)
    while high is None or high - low > 1:
        stride = max(1, abs(batch - guess))  # 1, 1, 2, 4, ... from the guess
        if fits(batch):
            low = batch
        else:
            high = batch
        if high is None:
            batch = low + stride
        elif low == 0:
            batch = max(1, high - stride)
        else:
            batch = (low + high) // 2
    return low


def largest_training_batch(
    step: Callable[[int], object],
    gib: float,
    tried: Callable[[Trial], object] = lambda trial: None,
) -> int | None:
    """The largest batch that a model trains on with ``gib`` GiB of CUDA memory,
    None where the search takes too long.

    What the driver takes for itself counts, so nothing else must run on the
    device. Two batch sizes give a guess; then the allocator's limit is set,
    and train steps succeed or run out of memory.

    Args:
        step: A train step with a batch of this size, cleaned up after.
        tried: Is told of each trial.
    """
    free_cache()
    end = time.monotonic() + SEARCH_S
    free, total = torch.cuda.mem_get_info()
    driver = total - free - torch.cuda.memory_reserved()
    limit = min(gib * 2**30, total) - driver
    peaks = [_peak(step, batch) for batch in (2, 3)]  # BN needs 2
    for_one = max(1, peaks[1] - peaks[0])

    def fits(batch: int) -> bool:
        if time.monotonic() > end:
            raise TimeoutError
        ms = _milliseconds(step, batch)
        tried(Trial(batch, ms))
        return ms is not None

    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        return largest_batch(fits, int((limit - peaks[0]) / for_one) + 2)
    except TimeoutError:
        return None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak(step: Callable[[int], object], batch: int) -> int:
    """Bytes allocated at most in a train step with the optimizer's state."""
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step(batch)
    return torch.cuda.max_memory_allocated()


def _milliseconds(step: Callable[[int], object], batch: int) -> float | None:
    """Of the second of two steps, the first of which chooses kernels."""
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(batch)
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:  # no failed attempt must weigh on the next
        free_cache()


def free_cache() -> None:
    """Gives back what models that are gone, or failed steps, have held."""
    gc.collect()
    torch.cuda.empty_cache()
