"""Fused GPU kernels. Importing this imports no Triton, which not every PyTorch
has: its functions import :mod:`.operators` when they are called."""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from convnext_mm.private_names import has

from .. import eager
from ..fused import compute_dtype
from ..weights import BlockWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_TRITON = '3.6'  # tests run with it; tuples in loops need a recent one
# Values of one sample's map: 4 hidden ones for each, and 32-bit offsets.
LARGEST_MAP = 2**31 // 4
# Samples times columns, which a grid's second and third size follow.
MOST_COLUMNS = 2**19
MIN_CAPABILITY = (8, 0)  # the oldest that the kernels are compiled for in tests
# What works_on tries: the widths of the first stages, whose products take several
# steps; tests make it less.
CHECKED_WIDTHS, CHECKED_SIZE = (96, 192), (40, 33)
CHECKED_DTYPES = (torch.float32, torch.bfloat16)
MOST_CANDIDATES = 5  # of a step; a test counts


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``, or None if they can."""
    for dtype in (x.dtype, compute_dtype(x)):
        if dtype not in DTYPES:
            return f'they compute in {_names(DTYPES)}, and the input is {dtype}'
    values = x.shape[1:].numel()
    if values >= LARGEST_MAP:
        return (
            f'a sample of the input has {values} values, and they take '
            f'less than {LARGEST_MAP}'
        )
    columns = x.shape[0] * max(8, x.shape[-1])
    if columns >= MOST_COLUMNS:
        return (
            f'an input of {tuple(x.shape)} has {columns} columns (of a sample at least '
            f'8), and they take less than {MOST_COLUMNS}'
        )
    return _device_reason(str(x.device))


@torch.compiler.assume_constant_result
def _device_reason(device: str) -> str | None:
    if not _has_triton():
        return f'Triton {MIN_TRITON} or above is missing: pip install triton'
    kind = torch.device(device).type
    if kind == 'cpu' and _interpreted():
        return None
    if kind != 'cuda' or torch.version.hip:
        return (
            'they need an NVIDIA GPU, and the input is on '
            f'{"an AMD GPU" if kind == "cuda" else kind} (on a CPU '
            'TRITON_INTERPRET=1 runs them, slowly, for debugging)'
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            'they need a GPU of compute capability '
            f'{".".join(map(str, MIN_CAPABILITY))} or above, this one has '
            f'{".".join(map(str, capability))}'
        )
    return None


@functools.cache
def _has_triton() -> bool:
    if importlib.util.find_spec('triton') is None:
        return False
    import triton

    found = tuple(map(int, triton.__version__.split('.')[:2]))
    return found >= tuple(map(int, MIN_TRITON.split('.')))


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ', '.join(str(dtype).split('.')[1] for dtype in dtypes)


def _interpreted() -> bool:
    import triton

    return has('triton.knobs.runtime.interpret') and triton.knobs.runtime.interpret


@torch.compiler.assume_constant_result
def works_on(device: str) -> bool:
    """Whether blocks of real widths give the plain one's numbers on a device, with
    every candidate for every step.

    A driver, a GPU or a Triton that nobody has tried the kernels on must not
    break a training run that asks for ``'auto'``: what happens here, once, is
    the fallback's reason and stands in the log.

    Raises:
        RuntimeError: A kernel broke the CUDA context, after which nothing runs.
    """
    return _works_on(device)


@functools.cache
def _works_on(device: str) -> bool:
    try:
        # Hooks of a checkpoint around this must not see its tensors.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            for channels, dtype in itertools.product(CHECKED_WIDTHS, CHECKED_DTYPES):
                _check(device, channels, dtype)
    except Exception as error:  # whatever a compiler or driver may raise
        if torch.device(device).type == 'cuda':
            # An error that broke the context comes again, from here.
            torch.cuda.synchronize(device)
        print_log(
            f'the Triton kernels do not work on {device}, another implementation runs '
            f'instead: {type(error).__name__}: {error}',
            'current',
            30,
        )
        return False
    return True


def _check(device: str, channels: int, dtype: torch.dtype) -> None:
    """Raises ArithmeticError where outputs or gradients are off."""
    from . import operators
    from .choose import taking

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        # Whatever the user's default device and dtype are.
        return torch.randn(
            shape, generator=generator, device='cpu', dtype=torch.float32
        ).to(device)

    c, m = channels, 4 * channels
    # Magnitudes of a network's; several tiles, the last ones not full.
    x = randn(2, c, *CHECKED_SIZE).contiguous(memory_format=torch.channels_last)
    weights = BlockWeights(
        dwconv_weight=randn(c, 1, 7, 7) / 7,
        dwconv_bias=randn(c),
        norm_weight=randn(c),
        norm_bias=randn(c),
        pwconv1_weight=randn(m, c) / c**0.5,
        pwconv1_bias=randn(m),
        pwconv2_weight=randn(c, m) / m**0.5,
        pwconv2_bias=randn(c),
        gamma=randn(c),
    )
    autocast = torch.autocast(
        torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
    )

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [v.clone().requires_grad_() for v in (x, *weights) if v is not None]
        with autocast:
            out = function(inputs[0], BlockWeights(*inputs[1:]))
        return [out, *torch.autograd.grad(out.float().square().mean(), inputs)]

    expected = run(eager.block)
    # TF32, if the user has it on, is as coarse as bf16's products.
    limit = 0.1 if dtype == torch.bfloat16 else 0.02
    for number in range(MOST_CANDIDATES):
        with taking(number):
            got = run(operators.block)
        for plain, fused in zip(expected, got):
            difference = (plain - fused).abs().max() / plain.abs().max()
            if not difference < limit:
                raise ArithmeticError(
                    f'with {c} channels in {dtype} a value is off by '
                    f'{difference:.2g} of the largest (choice {number})'
                )


def block(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`convnext_mm.ops.eager.block`, fused."""
    from . import operators

    return operators.block(*args, **kwargs)


def downsample(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`convnext_mm.ops.eager.downsample`, fused."""
    from . import operators

    return operators.downsample(*args, **kwargs)


def norm(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`convnext_mm.ops.eager.norm`, fused."""
    from . import operators

    return operators.norm(*args, **kwargs)
