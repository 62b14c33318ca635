"""Which of several equal ways is taken, and how a kernel starts."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import triton
from mmengine.logging import print_log
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
# How often a choice is left open because there was no memory to measure all.
PATIENCE = 3

Candidate = TypeVar('Candidate')
_fixed: ContextVar[int | None] = ContextVar('fixed', default=None)
_fastest: dict[tuple, Any] = {}
_unfinished: Counter[tuple] = Counter()
_compiled: dict[tuple, Any] = {}


@contextlib.contextmanager
def taking(number: int) -> Iterator[None]:
    """Candidates of that number, modulo how many there are, and nothing is measured.
    Backward passes stay in this thread, where this is known."""
    token = _fixed.set(number)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _fixed.reset(token)


def fastest(
    key: tuple,
    rows: int,
    candidates: Sequence[Candidate],
    run: Callable[[Candidate], object],
) -> Candidate:
    """The candidate that ``run(candidate)`` takes the least time with,
    measured when a key is first met, remembered for the process.

    Keys hold channels and dtypes; of the size of the map only its order of
    magnitude, so that a first, tiny one does not decide for all, and
    multi-scale training, where every step has another size, measures once or
    twice. PyTorch's deterministic mode takes the first candidate: two runs must
    not differ in what happened to be faster. (``triton.autotune`` compares
    settings of one kernel; here PyTorch's product is a candidate too.)

    A candidate that cannot be compiled, loaded or started is left out, which the
    log says. Where memory does not suffice to measure all, the choice is open
    again the next time, :data:`PATIENCE` times.

    Args:
        rows: Pixels of all samples.

    Raises:
        RuntimeError: No candidate runs, or a failure broke the CUDA context, after
            which nothing can run.
    """
    if len(candidates) == 1:
        return candidates[0]
    number = _fixed.get()
    if number is not None:
        return candidates[number % len(candidates)]
    if INTERPRETED or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    key = (torch.cuda.current_device(), rows.bit_length() // 3, *key)
    found = _fastest.get(key)
    if found is None:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed
            return candidates[0]
        found = _measure(key, candidates, run)
    return candidates[found]


def _measure(
    key: tuple, candidates: Sequence[Candidate], run: Callable[[Candidate], object]
) -> int:
    """The number of the fastest."""
    times: dict[int, float] = {}
    failures: dict[int, Exception] = {}
    for number, candidate in enumerate(candidates):
        try:
            times[number] = _time(run, candidate)
        except torch.cuda.OutOfMemoryError as error:
            failures[number] = error.with_traceback(None)
        except Exception as error:  # whatever a compiler or driver may raise
            # An error that broke the context comes again, from here.
            torch.cuda.synchronize()
            # Its frames would keep memory from the other candidates.
            failures[number] = error.with_traceback(None)
            print_log(
                f'{key[2]}: left out {candidate}, which does not run here: '
                f'{type(error).__name__}: {error}',
                'current',
                30,
            )
    no_memory = [
        number
        for number, error in failures.items()
        if isinstance(error, torch.cuda.OutOfMemoryError)
    ]
    if not times and not no_memory:
        raise RuntimeError(
            f'no way to compute {key[2]} runs here; '
            "impl='lean' or CONVNEXT_MM_IMPL=lean does without these kernels"
        ) from failures[0]
    best = min(times, key=times.__getitem__) if times else no_memory[0]
    _unfinished[key] += bool(no_memory)
    if not no_memory or _unfinished[key] >= PATIENCE:
        _fastest[key] = best
    return best


def _time(run: Callable[[Candidate], object], candidate: Candidate) -> float:
    """Median milliseconds."""
    return float(
        triton.testing.do_bench(
            lambda: run(candidate), warmup=2, rep=10, return_mode='median'
        )
    )


@functools.cache
def programs_at_once() -> int:
    """A grid that fills the device a few times."""
    if INTERPRETED:
        return 3
    device = torch.cuda.current_device()
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """Rounded up. Triton's own is a function for kernels, and slow outside of them."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def start(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    settings: tuple[Any, ...],
    **options: int,
) -> None:
    """``kernel[grid](*tensors, *sizes, *settings, **options)``.

    Triton's own way to the compiled kernel looks at each argument anew, which takes
    longer than a small kernel. Here it does so when a combination is first met.

    Args:
        tensors: The first of them decides on the device.
        sizes: Integers of 32 bits that are no part of what is compiled.
        settings: All that may be.
    """
    key = (
        id(kernel),
        tensors[0].get_device(),  # type: ignore[union-attr]
        settings,
        tuple(options.values()),
        # Triton compiles for a dtype, and for an address that 16 divides.
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
    )
    known = _compiled.get(key)
    if known is not None:
        known[1][grid](*tensors, *sizes, *settings)
        return
    compiled = kernel[grid](*tensors, *sizes, *settings, **options)
    if compiled is not None:  # the interpreter's is
        _compiled[key] = kernel, compiled  # the first so that its id stays taken
