"""Memory and traffic of training in several processes, from shapes alone.

Weights, gradients and AdamW's two states are in fp32. Collectives go around a
ring: of n bytes that all gather, or of which each gets a reduced part, a process
sends (count - 1) / count * n; an all-reduce is both.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

FP32 = 4  # bytes
STATES = 2  # of AdamW, beside a number per parameter
Unit = Sequence[Tensor]  # parameters that are gathered together


class Cost(NamedTuple):
    """Bytes in, or sent by, one process.

    Attributes:
        held: Weights, gradients and the optimizer's states that it has always.
        gathered: At most, whole weights and gradients of units that run.
        sent: In a step.
    """

    held: int
    gathered: int
    sent: int


def shard_dim(shape: Sequence[int], count: int) -> int:
    """The dimension by which a parameter is cut into ``count`` shards: the first,
    or where that is shorter than ``count`` one that divides evenly. (The first of
    GRN's (1, 1, 1, C) would be padded to ``count`` times its size.)"""
    if shape[0] < count:
        for dim, size in enumerate(shape):
            if size % count == 0:
                return dim
    return 0


def shard_size(shape: Sequence[int], count: int) -> int:
    """Elements of the largest shard, to which the others are padded."""
    dim = shard_dim(shape, count)
    size = -(-shape[dim] // count)
    for other, length in enumerate(shape):
        size *= length if other != dim else 1
    return size


def replicated(parameters: Iterable[Tensor], count: int) -> Cost:
    """Of ``DistributedDataParallel``, whose gradients lie in buckets as well.

    Args:
        parameters: Of the whole model; on any device.
        count: Of processes.
    """
    weights = trained = 0
    for param in parameters:
        weights += FP32 * param.numel()
        trained += FP32 * param.numel() * param.requires_grad
    return Cost(
        held=weights + (2 + STATES) * trained,
        gathered=0,
        sent=2 * (count - 1) * trained // count,
    )


def sharded(units: Sequence[Unit], count: int) -> Cost:
    """Of :class:`convnext_mm.engine.sharding.FullyShard`, which gathers weights for
    the forward and again for the backward pass, and sends each gradient to the
    process that has its part. What is left of the model stays gathered from one to
    the other, and its gradients whole until the end of backward. At the peak two
    units are gathered, one runs and the next is on its way, with the gradients of
    one, and a copy of those to be sent.

    Args:
        units: Parameters of each unit, on any device; last, what is left.
        count: Of processes.
    """
    weights = [FP32 * sum(shard_size(p.shape, count) for p in u) for u in units]
    trained = [
        FP32 * sum(shard_size(p.shape, count) for p in u if p.requires_grad)
        for u in units
    ]
    largest = max(range(len(units) - 1), key=weights.__getitem__)
    whole = (
        weights[-1] + trained[-1] + 2 * weights[largest] + 2 * trained[largest]
    ) * count
    return Cost(
        held=sum(weights) + (1 + STATES) * sum(trained),
        gathered=whole,
        sent=(count - 1) * (2 * sum(weights) - weights[-1] + sum(trained)),
    )
