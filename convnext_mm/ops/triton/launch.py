"""What prepares, chooses and starts the kernels of :mod:`.kernels`.

Maps are (N, H, W, C) or (N, P, C), contiguous.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import kernels

INTERPRETED = triton.knobs.runtime.interpret
# Accumulators of a thread, with LayerNorm to follow and without: more spill.
NORM_VALUES, PLAIN_VALUES = 16, 32
_fastest: dict[tuple, Any] = {}
# Checks set it: the number of the candidate to take, nothing is measured.
fixed_choice: int | None = None

Candidate = TypeVar('Candidate')


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


def _time(run: Callable[[Candidate], object], candidate: Candidate) -> float:
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


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dilation: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    keep_maps: bool,
) -> tuple[Tensor | None, Tensor]:
    """Depthwise convolution, then LayerNorm.

    Args:
        x: (N, H, W, C).
        weight: (C, 1, K, K).
        bias, norm_weight, norm_bias: (C,).

    Returns:
        The convolution's output with ``keep_maps``, else None, and LayerNorm's;
        both like ``x``.
    """
    out = torch.empty_like(x) if keep_maps else None
    normed = torch.empty_like(x)
    norm = (norm_weight, norm_bias, normed, eps)
    _depthwise(x, weight, bias, dilation, out, norm=norm)
    return out, normed


def depthwise_input_grad(
    grad: Tensor, weight: Tensor, dilation: int, residual: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the depthwise convolution's input plus ``residual``, in
    ``dtype``; both and ``grad`` (N, H, W, C)."""
    out = torch.empty_like(grad, dtype=dtype)
    # Same padding, stride 1: the same convolution with the kernel turned round.
    _depthwise(grad, weight, None, dilation, out, residual=residual, flip=True)
    return out


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    out: Tensor | None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor, float] | None = None,
    flip: bool = False,
) -> None:
    """:func:`.kernels.depthwise_kernel` of (N, H, W, C), into ``out``; ``norm`` is
    LayerNorm's weight, bias, output and eps."""
    n, height, width, channels = x.shape
    size = weight.shape[-1]
    taps = weight.to(x.dtype).view(channels, size * size).t().contiguous()
    norm_weight, norm_bias, normed, eps = norm or (None, None, None, 0.0)
    if not x.numel():
        return

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
        None if out is None else out.dtype,
        norm is None,
        residual is None,
    )
    tiles = depthwise_tiles(channels, norm is not None)
    run(fastest(key, n * height * width, tiles, run))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input (N, P, C), the weight and the bias (C,).

    Args:
        grad: (N, P, C), or (N, C, P) without ``grad_last``.
        x: (N, P, C).
        normed: Where the output goes again, None or (N, P, C); may be
            ``grad``.
    """
    n, pixels, channels = x.shape
    out = torch.empty_like(x)
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


class Product(NamedTuple):
    """``x W^T + b`` and what follows it, see :func:`.kernels.linear_kernel`.

    Attributes:
        x: (N, P, K).
        weight: (M, K), any strides.
        out_dtype: Of the output.
        second: Whether there is a second output.
        sums: Whether the output's sum over rows is wanted.
        hidden, residual: (N, P, M), or None.
        scale: (N or 1, 1, M or 1) fp32, or None for 1.
    """

    epilogue: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out_dtype: torch.dtype
    second: bool = False
    sums: bool = False
    hidden: Tensor | None = None
    residual: Tensor | None = None
    scale: Tensor | None = None


Outputs = tuple[Tensor, Tensor | None, Tensor | None]


def _fastest_product(product: Product, library: Callable[[], Outputs]) -> Outputs:
    """The output, the second one and the sums: of ``library``, which is PyTorch's
    product and what follows it, or of one kernel, whichever is faster. fp32 is
    PyTorch's alone, which knows the user's choice on TF32.
    """
    x, columns = product.x, len(product.weight)

    def run(tile: ProductTile | None) -> Outputs:
        return library() if tile is None else _one_kernel(product, tile)

    candidates: tuple[ProductTile | None, ...] = (None,)
    if x.dtype != torch.float32 and x.numel():
        candidates += PRODUCT_TILES[product.epilogue]
    key = (product.epilogue, x.shape[2], columns, x.dtype, product.second)
    return run(fastest(key, x.shape[0] * x.shape[1], candidates, run))


def _one_kernel(product: Product, tile: ProductTile) -> Outputs:
    x, weight, scale = product.x, product.weight, product.scale
    n, pixels, inner = x.shape
    rows, columns = n * pixels, len(weight)
    row_blocks = triton.cdiv(rows, tile.rows)
    out = x.new_empty(n, pixels, columns, dtype=product.out_dtype)
    second = sums = None
    if product.second:
        second = x.new_empty(n, pixels, columns)
    if product.sums:
        sums = x.new_empty(row_blocks, columns, dtype=torch.float32)
    scale_strides = (0, 0)
    if scale is not None:
        scale_strides = (
            scale.stride(0) if len(scale) > 1 else 0,
            scale.stride(2) if scale.shape[2] > 1 else 0,
        )
    kernels.linear_kernel[(row_blocks * triton.cdiv(columns, tile.columns),)](
        x,
        weight,
        product.bias,
        product.hidden,
        product.residual,
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
        *scale_strides,
        product.epilogue,
        tile.rows,
        tile.columns,
        tile.inner,
        8,
        INTERPRETED and x.dtype == torch.bfloat16,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, second, None if sums is None else sums.sum(0)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``gelu(y)`` of ``y = x W^T + b``, and ``y`` where ``keep`` says so.

    Args:
        x: (N, P, K).
        weight: (M, K).
    """

    def library() -> Outputs:
        y = F.linear(x, weight, bias)
        return F.gelu(y), y if keep else None, None

    product = Product('gelu', x, weight, bias, x.dtype, second=keep)
    return _fastest_product(product, library)[:2]


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

    def library() -> Outputs:
        y = F.linear(x, weight, bias)
        out = residual.new_empty(residual.shape, dtype=out_dtype)
        if scale is None:
            return torch.add(residual, y, out=out), None, None
        return torch.addcmul(residual, y, scale, out=out), None, None

    product = Product(
        'residual', x, weight, bias, out_dtype, residual=residual, scale=scale
    )
    return _fastest_product(product, library)[0]


def linear_gelu_backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, keep_activation: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward of ``gelu(hidden) W^T``: as :func:`gelu_backward`.

    Args:
        grad: (N, P, C).
        weight: (C, M).
        hidden: (N, P, M).
    """

    def library() -> Outputs:
        return gelu_backward(F.linear(grad, weight.t()), hidden, keep_activation)

    product = Product(
        'gelu_backward',
        grad,
        weight.t(),
        None,
        grad.dtype,
        second=keep_activation,
        sums=True,
        hidden=hidden,
    )
    out, activation, sums = _fastest_product(product, library)
    assert sums is not None
    return out, activation, sums
