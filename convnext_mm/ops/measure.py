"""Which plain implementation is the faster on a device, measured there."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from mmengine.logging import print_log
from torch import Tensor

from . import eager, lean
from .weights import BlockWeights

# A block of the first stage, on a map that keeps a GPU busy.
CHANNELS, SIZE, ROUNDS = 96, (2, 128, 128), 7


@torch.compiler.assume_constant_result
def lean_is_as_fast(device: str) -> bool:
    """Whether a train step of a lean block takes no longer than plain PyTorch's, by
    the medians of a few interleaved ones: then it is the better, for its memory.
    Measured once for each device; the log says what came out."""
    return _lean_is_as_fast(device)


@functools.cache
def _lean_is_as_fast(device: str) -> bool:
    if not lean.available():
        return False
    # Hooks of a checkpoint around this must not see its tensors.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    ):
        times = _times(device)
    ratio = times['lean'] / times['eager']
    print_log(
        f'a train step of a ConvNeXt block on {device} takes {ratio:.2f} of plain '
        "PyTorch's time with impl='lean'",
        'current',
    )
    return ratio <= 1


def _times(device: str) -> dict[str, float]:
    """Seconds by implementation."""
    n, height, width = SIZE
    c, m = CHANNELS, 4 * CHANNELS
    # The user's own random numbers stay as they would be.
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(
            shape, generator=generator, device='cpu', dtype=torch.float32
        )
        return values.to(device).requires_grad_()

    weights = BlockWeights(
        dwconv_weight=randn(c, 1, 7, 7),
        dwconv_bias=randn(c),
        norm_weight=randn(c),
        norm_bias=randn(c),
        pwconv1_weight=randn(m, c),
        pwconv1_bias=randn(m),
        pwconv2_weight=randn(c, m),
        pwconv2_bias=randn(c),
        gamma=randn(c),
    )
    x = randn(n, c, height, width)
    wanted = [x, *(w for w in weights if w is not None)]

    def seconds(block: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(block(x, weights).square().mean(), wanted)
        if x.is_cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    blocks = dict(eager=eager.block, lean=lean.block)
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(2 + ROUNDS):
        for name, block in blocks.items():
            times[name].append(seconds(block))
    return {name: statistics.median(each[2:]) for name, each in times.items()}
