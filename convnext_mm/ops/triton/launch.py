"""What prepares, chooses and starts the kernels of :mod:`.kernels`.

Maps are (N, H, W, C) or (N, P, C), contiguous.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import kernels

INTERPRETED = triton.knobs.runtime.interpret
# Accumulators of a thread, with LayerNorm to follow and without: more spill.
NORM_VALUES, PLAIN_VALUES = 16, 32
_fastest: dict[tuple, object] = {}
# Checks set it: the number of the candidate to take, nothing is measured.
fixed_choice: int | None = None


class Tile(NamedTuple):
    """Of :func:`.kernels.depthwise_kernel`."""

    height: int
    width: int
    block_c: int
    warps: int


class ProductTile(NamedTuple):
    """Of :func:`.kernels.linear_kernel`."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By epilogue: GELU's derivative needs more registers. The first that fits is a
# good guess; which is fastest is measured.
PRODUCT_TILES = {
    epilogue: tuple(ProductTile(*tile) for tile in tiles)
    for epilogue, tiles in dict(
        gelu=(
            (128, 128, 64, 8, 3),
            (128, 64, 64, 4, 4),
            (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4),
        ),
        residual=(
            (128, 128, 64, 8, 3),
            (128, 64, 64, 4, 4),
            (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4),
        ),
        gelu_backward=((128, 64, 64, 8, 3), (64, 128, 64, 8, 3), (64, 64, 64, 4, 4)),
    ).items()
}


def fastest(key: tuple, rows: int, candidates: Sequence, run: Callable) -> object:
    """The candidate that ``run(candidate)`` takes the least time with,
    measured when a key is first met, remembered for the process.

    Keys hold channels and dtypes; of the size of the map only its order of
    magnitude, so that a first, tiny one does not decide for all, and
    multi-scale training, where every step has another size, measures once or
    twice. PyTorch's deterministic mode takes the first candidate: two runs must
    not differ in what happened to be faster. (``triton.autotune`` compares
    settings of one kernel; here PyTorch's product is a candidate too.)

    Args:
        rows: Pixels of all samples.
    """
    if fixed_choice is not None:
        return candidates[fixed_choice % len(candidates)]
    if (
        len(candidates) == 1
        or INTERPRETED
        or torch.are_deterministic_algorithms_enabled()
    ):
        return candidates[0]
    key = (torch.cuda.current_device(), rows.bit_length() // 3, *key)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed
            return candidates[0]
        times = [_time(run, candidate) for candidate in candidates]
        if min(times) == float('inf'):  # no memory now, maybe later
            return candidates[0]
        _fastest[key] = candidates[times.index(min(times))]
    return _fastest[key]


def _time(run: Callable, candidate: object) -> float:
    """Median milliseconds; infinity where memory does not suffice for it or
    for measuring."""
    try:
        return triton.testing.do_bench(
            lambda: run(candidate), warmup=2, rep=10, return_mode='median'
        )
    except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
        return float('inf')


@functools.cache
def programs_at_once() -> int:
    """A grid that fills the device a few times."""
    if INTERPRETED:
        return 3
    return (
        4
        * torch.cuda.get_device_properties(
            torch.cuda.current_device()
        ).multi_processor_count
    )


def depthwise_tiles(channels: int, norm: bool) -> list[Tile]:
    """Candidates, the likeliest first. ``norm`` needs all channels in one."""
    block_c = triton.next_power_of_2(channels)
    if not norm:
        block_c = min(block_c, 64)
    tiles = []
    values, shapes = (
        (NORM_VALUES, ((4, 2), (8, 2), (8, 4), (8, 1)))
        if norm
        else (PLAIN_VALUES, ((4, 4), (8, 4), (4, 2), (8, 2)))
    )
    for warps, height in shapes:
        width = values * 32 * warps // (height * block_c)
        if width:
            tiles.append(Tile(height, min(width, 16), block_c, warps))
    return tiles or [Tile(1, 1, block_c, 16)]


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
    flip: bool = False,
    out_dtype: torch.dtype | None = None,
    keep_maps: bool = True,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution, residual addition and LayerNorm.

    Args:
        x: (N, H, W, C).
        weight: (C, 1, K, K).
        bias: (C,), or None.
        norm: LayerNorm's weight, bias and eps, or None.
        residual: (N, H, W, C), added to the output.
        flip: The kernel turned round.
        keep_maps: Whether the output before LayerNorm is wanted.

    Returns:
        The output in ``out_dtype`` (default: that of ``x``) and the normalised
        output in that of ``x``; None for what was not asked for.
    """
    n, height, width, channels = x.shape
    size = weight.shape[-1]
    taps = weight.to(x.dtype).view(channels, size * size).t().contiguous()
    out = torch.empty_like(x, dtype=out_dtype) if keep_maps else None
    normed = None if norm is None else torch.empty_like(x)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    if not x.numel():
        return out, normed

    def run(tile: Tile) -> None:
        phase_rows = triton.cdiv(triton.cdiv(height, dilation), tile.height)
        grid = (
            n * dilation * phase_rows * triton.cdiv(width, tile.width),
            triton.cdiv(channels, tile.block_c),
        )
        kernels.depthwise_kernel[grid](
            x,
            taps,
            bias,
            residual,
            norm_weight,
            norm_bias,
            out,
            normed,
            height,
            width,
            channels,
            eps,
            size,
            dilation,
            flip,
            tile.height,
            tile.width,
            tile.block_c,
            num_warps=tile.warps,
        )

    key = (
        'depthwise',
        channels,
        size,
        dilation,
        x.dtype,
        out_dtype,
        norm is None,
        residual is None,
        keep_maps,
    )
    tiles = depthwise_tiles(channels, norm is not None)
    run(fastest(key, n * height * width, tiles, run))
    return out, normed


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, size: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise weight (C, 1, K, K) and bias (C,), fp32, of
    (N, H, W, C) input and output gradient."""
    n, height, width, channels = grad.shape
    if not grad.numel():
        return (
            grad.new_zeros(channels, 1, size, size, dtype=torch.float32),
            grad.new_zeros(channels, dtype=torch.float32),
        )
    block_c = min(triton.next_power_of_2(channels), 64)
    blocks = triton.cdiv(channels, block_c)
    shares = min(n * height, triton.cdiv(4 * programs_at_once(), size * blocks))
    parts = grad.new_empty(shares, size * size, channels, dtype=torch.float32)
    bias_parts = grad.new_empty(shares, channels, dtype=torch.float32)
    kernels.depthwise_weight_grad_kernel[(size, blocks, shares)](
        x,
        grad,
        parts,
        bias_parts,
        height,
        width,
        n * height,
        channels,
        size,
        dilation,
        8,
        block_c,
        num_warps=4,
    )
    weight_grad = parts.sum(0).t().reshape(channels, 1, size, size)
    return weight_grad, bias_parts.sum(0)


def _norm_tile(channels: int, values: int) -> dict[str, int]:
    """``values`` of a tile for each thread."""
    block_c = triton.next_power_of_2(channels)
    rows = min(32, max(1, 4096 // block_c))
    return dict(
        BLOCK_R=rows, BLOCK_C=block_c, num_warps=max(4, rows * block_c // (32 * values))
    )


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    out_last: bool = True,
) -> Tensor:
    """LayerNorm of (N, P, C) into ``out``, of the same shape or, without
    ``out_last``, (N, C, P)."""
    n, pixels, channels = x.shape
    if x.numel():
        tile = _norm_tile(channels, 32)
        grid = triton.cdiv(pixels, tile['BLOCK_R']), n
        kernels.layer_norm_kernel[grid](
            x, weight, bias, out, pixels, channels, eps, out_last, **tile
        )
    return out


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    normed: Tensor | None = None,
    grad_last: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (N, P, C), the weight and the bias (C,).

    Args:
        grad: (N, P, C), or (N, C, P) without ``grad_last``.
        x: (N, P, C).
        normed: Where the output goes again, None or (N, P, C); may be
            ``grad``.
    """
    n, pixels, channels = x.shape
    out = torch.empty_like(x, dtype=out_dtype)
    if not x.numel():
        zeros = x.new_zeros(channels, dtype=torch.float32)
        return out, zeros, zeros.clone()
    # Without the limit ptxas aims at 128 registers for wide rows, and spills.
    tile = dict(_norm_tile(channels, 16), maxnreg=240)
    programs = min(n * triton.cdiv(pixels, tile['BLOCK_R']), programs_at_once())
    parts = x.new_empty(2, programs, channels, dtype=torch.float32)
    kernels.layer_norm_backward_kernel[(programs,)](
        grad,
        x,
        weight,
        bias,
        out,
        normed,
        *parts,
        n,
        pixels,
        channels,
        eps,
        grad_last,
        **tile,
    )
    return (out, *(part.sum(0) for part in parts))


# Rows and columns of the tiles of the kernels between the matrix products.
_BLOCK_R, _BLOCK_M = 8, 128


def _gelu_grid(n: int, pixels: int, hidden: int) -> tuple[int, int, int]:
    columns = triton.cdiv(hidden, _BLOCK_M)
    wanted = triton.cdiv(4 * programs_at_once(), n * columns)
    return min(triton.cdiv(pixels, _BLOCK_R), wanted), columns, n


def gelu_scaled(x: Tensor, scale: Tensor) -> Tensor:
    """``gelu(x) * scale`` of (N, P, M) and (N, 1, M), in the dtype of ``x``."""
    n, pixels, hidden = x.shape
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(pixels, _BLOCK_R), triton.cdiv(hidden, _BLOCK_M), n)
        kernels.gelu_scaled_kernel[grid](
            x, scale.contiguous(), out, pixels, hidden, _BLOCK_R, _BLOCK_M
        )
    return out


def gelu_sums(x: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
    """Sums over pixels, (N, 1, M) fp32, of ``gelu(x)`` squared; with ``grad``
    those of ``gelu(x) * grad`` and of ``grad``. All in (N, P, M)."""
    n, pixels, hidden = x.shape
    if not x.numel():
        zeros = x.new_zeros(n, 1, hidden, dtype=torch.float32)
        return (zeros, zeros)
    grid = _gelu_grid(n, pixels, hidden)
    parts = x.new_empty(
        1 if grad is None else 2, grid[0], n, hidden, dtype=torch.float32
    )
    kernels.gelu_sums_kernel[grid](
        x,
        grad,
        parts[0],
        None if grad is None else parts[1],
        pixels,
        hidden,
        _BLOCK_R,
        _BLOCK_M,
    )
    return tuple(parts.sum(1).unsqueeze(2))


def gelu_backward(
    grad: Tensor,
    x: Tensor,
    keep_activation: bool,
    grn: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward of GELU, and of GRN after it.

    Args:
        grad: (N, P, M), the output's gradient; overwritten.
        x: (N, P, M), the pre-activation.
        grn: Factor, gradient through the norm (both (N, 1, M) fp32) and beta.

    Returns:
        The gradient of ``x``; the output, with ``keep_activation``; the
        gradient's sum over rows (M,), fp32.
    """
    # Without GRN samples do not matter.
    n, pixels, hidden = (
        (1, x.shape[0] * x.shape[1], x.shape[2]) if grn is None else x.shape
    )
    activation = torch.empty_like(x) if keep_activation else None
    if not x.numel():
        return grad, activation, x.new_zeros(hidden, dtype=torch.float32)
    grid = _gelu_grid(n, pixels, hidden)
    parts = x.new_empty(grid[0], n, hidden, dtype=torch.float32)
    scale, along, beta = (
        (None, None, None) if grn is None else (t.contiguous() for t in grn)
    )
    kernels.gelu_backward_kernel[grid](
        grad,
        x,
        scale,
        along,
        beta,
        grad,
        activation,
        parts,
        pixels,
        hidden,
        _BLOCK_R,
        _BLOCK_M,
    )
    return grad, activation, parts.sum((0, 1))


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: str,
    library: Callable,
    out_dtype: torch.dtype,
    **arguments,
) -> tuple[Tensor, ...]:
    """A matrix product with what follows it: PyTorch's and ``library`` after
    it, or one kernel, whichever is faster. fp32 is PyTorch's alone, which
    knows the user's choice on TF32.

    Args:
        x: (N, P, K).
        weight: (M, K), any strides.
        library: ``()`` to the results, with PyTorch's product.
        out_dtype: Of the kernel's output.
        arguments: Of the kernel: ``second`` (whether it writes a second
            output), ``sums``, ``hidden``, ``residual``, ``scale``.
    """
    n, pixels, inner = x.shape
    rows, columns = n * pixels, len(weight)

    def run(tile: ProductTile | None) -> tuple[Tensor, ...]:
        if tile is None:
            return library()
        out = x.new_empty(n, pixels, columns, dtype=out_dtype)
        second = sums = None
        row_blocks = triton.cdiv(rows, tile.rows)
        if arguments.get('second'):
            second = x.new_empty(n, pixels, columns)
        if arguments.get('sums'):
            sums = x.new_empty(row_blocks, columns, dtype=torch.float32)
        scale = arguments.get('scale')
        strides = (
            (0, 0)
            if scale is None
            else (
                scale.stride(0) if len(scale) > 1 else 0,
                scale.stride(2) if scale.shape[2] > 1 else 0,
            )
        )
        kernels.linear_kernel[(row_blocks * triton.cdiv(columns, tile.columns),)](
            x,
            weight,
            bias,
            arguments.get('hidden'),
            arguments.get('residual'),
            scale,
            out,
            second,
            sums,
            rows,
            pixels,
            columns,
            inner,
            weight.stride(1),
            weight.stride(0),
            *strides,
            epilogue,
            tile.rows,
            tile.columns,
            tile.inner,
            8,
            INTERPRETED and x.dtype == torch.bfloat16,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out, second, None if sums is None else sums.sum(0)

    candidates = (None,)
    if x.dtype != torch.float32 and x.numel():
        candidates += PRODUCT_TILES[epilogue]
    key = (epilogue, inner, columns, x.dtype, bool(arguments.get('second')))
    return run(fastest(key, rows, candidates, run))


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``gelu(y)`` of ``y = x W^T + b``, and ``y`` where ``keep`` says so.

    Args:
        x: (N, P, K).
        weight: (M, K).
    """

    def library() -> tuple[Tensor, Tensor | None]:
        y = F.linear(x, weight, bias)
        return F.gelu(y), y if keep else None

    return _product(x, weight, bias, 'gelu', library, x.dtype, second=keep)[:2]


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``residual + scale * (x W^T + b)``.

    Args:
        x: (N, P, M).
        weight: (C, M).
        residual: (N, P, C).
        scale: (N or 1, 1, C or 1) fp32, or None for 1.
    """

    def library() -> tuple[Tensor]:
        y = F.linear(x, weight, bias)
        out = residual.new_empty(residual.shape, dtype=out_dtype)
        if scale is None:
            return (torch.add(residual, y, out=out),)
        return (torch.addcmul(residual, y, scale, out=out),)

    return _product(
        x, weight, bias, 'residual', library, out_dtype, residual=residual, scale=scale
    )[0]


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, keep_activation: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward of ``gelu(hidden) W^T``: as :func:`gelu_backward`.

    Args:
        grad: (N, P, C).
        weight: (C, M).
        hidden: (N, P, M).
    """

    def library() -> tuple[Tensor, Tensor | None, Tensor]:
        return gelu_backward(F.linear(grad, weight.t()), hidden, keep_activation)

    return _product(
        grad,
        weight.t(),
        None,
        'gelu_backward',
        library,
        grad.dtype,
        hidden=hidden,
        second=keep_activation,
        sums=True,
    )
