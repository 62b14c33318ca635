"""The largest batch that a device of a given memory trains on."""

import gc
from collections.abc import Callable

import torch

from .models import Training


def largest_batch(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number for which ``fits`` is true, 0 if there is none; true
    for all that are smaller. Near ``guess`` it is found soonest."""
    batch = max(1, guess)
    while batch and not fits(batch):
        batch -= 1
    if batch < guess:
        return batch
    while fits(batch + 1):
        batch += 1
    return batch


def largest_training_batch(training: Training, name: str, gib: float) -> int:
    """The largest batch that a model trains on with ``gib`` GiB of CUDA memory.

    What the driver takes for itself counts, so nothing else must run on the
    device. Two batch sizes give a guess; then the allocator's limit is set,
    and train steps succeed or run out of memory.
    """
    _free_cache()
    free, total = torch.cuda.mem_get_info()
    driver = total - free - torch.cuda.memory_reserved()
    limit = gib * 2**30 - driver
    peaks = [_peak(training, name, batch) for batch in (2, 3)]  # BN needs 2
    for_one = max(1, peaks[1] - peaks[0])
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        return largest_batch(
            lambda batch: _fits(training, name, batch),
            int((limit - peaks[0]) / for_one) + 2,
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak(training: Training, name: str, batch: int) -> int:
    """Bytes allocated at most in a train step with the optimizer's state."""
    training.set_batch(batch)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        training.step(name).run()
    return torch.cuda.max_memory_allocated()


def _fits(training: Training, name: str, batch: int) -> bool:
    training.set_batch(batch)
    try:
        for _ in range(2):
            training.step(name).run()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:  # no failed attempt must weigh on the next
        training.optim_wrappers[name].zero_grad()
        _free_cache()


def _free_cache() -> None:
    """Gives back what models that are gone, or failed steps, have held."""
    gc.collect()
    torch.cuda.empty_cache()
