"""The time that no implementation of a ConvNeXt can go below on a device:
FLOPs of its matrix products over the measured matrix rate, or the fewest bytes
it can move over the measured bandwidth, whichever is more."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

from convnext_mm.archs import ARCHS
from convnext_mm.private_names import has, onednn_multiplies

# The fewest values moved per channel, pixel and block (docs/performance.md).
LEAST_VALUES = dict(infer=18, train=59)
# Training computes the gradients of weights and of inputs too; nobody asks for
# that of the image.
PASSES = dict(infer=1, train=3)
STEM_PASSES = dict(infer=1, train=2)
# Side of the square matrices whose product shows the rate.
MATRIX_SIZE = dict(cpu=2048, cuda=8192)
SLOW_MATRIX_SIZE = 256  # of dtypes that a CPU has no units for: a hundred times slower
COPY_VALUES = dict(cpu=2**26, cuda=2**30)


class Cost(NamedTuple):
    """Of one pass or train step of a batch.

    Attributes:
        matrix_flops: 2 for each multiply-add of a pointwise, stem or
            downsampling layer.
        depthwise_flops: The same of the depthwise convolutions, which matrix
            units do not compute.
        least_bytes: That the blocks' maps make move.
    """

    matrix_flops: int
    depthwise_flops: int
    least_bytes: int


def backbone_cost(
    arch: str, batch: int, size: Sequence[int], mode: str, itemsize: int
) -> Cost:
    """The cost of a named architecture.

    Args:
        size: (H, W) of the images.
        mode: ``'infer'`` or ``'train'``.
        itemsize: Bytes of a value in the dtype that the blocks compute in.
    """
    height, width = size[0] // 4, size[1] // 4
    matrix = depthwise = values = 0
    fan_in = None
    for depth, channels in zip(*ARCHS[arch][:2]):
        if fan_in is None:
            layer, passes = 3 * 16 * channels, STEM_PASSES[mode]
        else:
            height, width = height // 2, width // 2
            layer, passes = 4 * fan_in * channels, PASSES[mode]
        pixels = batch * height * width
        matrix += 2 * pixels * (passes * layer + PASSES[mode] * depth * 8 * channels**2)
        depthwise += 2 * pixels * PASSES[mode] * depth * 49 * channels
        values += LEAST_VALUES[mode] * pixels * depth * channels
        fan_in = channels
    return Cost(matrix, depthwise, values * itemsize)


class Rates:
    """What a device reaches, measured when first asked for.

    Args:
        device: ``'cpu'`` or ``'cuda'``.
        clock: Seconds, after what was asked of the device is done.
    """

    def __init__(self, device: str, clock: Callable[[], float]) -> None:
        self.device, self.clock = device, clock
        self._matrix: dict[torch.dtype, float] = {}
        self._bandwidth = 0.0

    def matrix(self, dtype: torch.dtype) -> float:
        """FLOP/s of a product of random matrices; on a CPU the better of
        PyTorch's choice and oneDNN, which the fused block calls."""
        if dtype not in self._matrix:
            n = MATRIX_SIZE[self.device]
            if self.device == 'cpu' and not onednn_multiplies(dtype):
                n = SLOW_MATRIX_SIZE
            a = torch.rand(n, n, device=self.device).to(dtype)
            products = ['a @ a']
            if (
                self.device == 'cpu'
                and onednn_multiplies(dtype)
                and has('torch.ops.mkldnn._linear_pointwise')
            ):
                products.append(
                    "torch.ops.mkldnn._linear_pointwise(a, a, None, 'none', [], '')"
                )
            seconds = min(self._best(product, a=a) for product in products)
            self._matrix[dtype] = 2 * n**3 / seconds
        return self._matrix[dtype]

    def bandwidth(self) -> float:
        """Bytes/s of a copy, those read and those written."""
        if not self._bandwidth:
            a = torch.rand(COPY_VALUES[self.device], device=self.device)
            seconds = self._best('b.copy_(a)', a=a, b=torch.empty_like(a))
            self._bandwidth = 2 * a.nbytes / seconds
        return self._bandwidth

    def floor_ms(self, flops: int, least_bytes: int, dtype: torch.dtype) -> float:
        return 1e3 * max(flops / self.matrix(dtype), least_bytes / self.bandwidth())

    def measured(self) -> dict:
        """What was measured so far, for a result file."""
        found: dict = {
            'matrix_flops_per_s': {
                str(dtype).removeprefix('torch.'): rate
                for dtype, rate in self._matrix.items()
            }
        }
        if self._bandwidth:
            found['bytes_per_s'] = self._bandwidth
        return found

    def _best(self, statement: str, **names: Any) -> float:
        timer = Timer(
            statement,
            globals=dict(torch=torch, **names),
            timer=self.clock,
            num_threads=torch.get_num_threads(),
        )
        return min(timer.blocked_autorange(min_run_time=0.3).times)
