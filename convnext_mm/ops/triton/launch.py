"""What prepares and starts the kernels of :mod:`.kernels`.

Maps are (N, H, W, C) or (N, P, C), contiguous.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import lean
from ..fused import residual_scale
from ..weights import BlockWeights
from . import kernels
from .choose import INTERPRETED, cdiv, fastest, next_power_of_2, programs_at_once, start

# A thread of the depthwise kernels holds all weights of a channel.
LARGEST_KERNEL = 11
_MM_INTO_FP32 = hasattr(torch.ops.aten.mm, 'dtype')


class Strips(NamedTuple):
    """How the depthwise kernels part a map: strips of ``width`` columns, as high as
    gives each warp that the device holds at once ``1 / waves`` of them."""

    width: int
    waves: float


class ProductTile(NamedTuple):
    """Of :func:`.kernels.linear_kernel` and :func:`.kernels.product_kernel`: rows and
    columns of a block of the output."""

    rows: int
    columns: int
    warps: int
    stages: int


# By epilogue: GELU's derivative needs more registers. The first that fits is a
# good guess; which is fastest is measured.
PRODUCT_TILES = {
    epilogue: tuple(ProductTile(*tile) for tile in tiles)
    for epilogue, tiles in dict(
        gelu=((128, 128, 8, 3), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)),
        residual=((128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 4, 4)),
        gelu_backward=((128, 64, 8, 3), (64, 128, 8, 3), (64, 64, 4, 4)),
    ).items()
}
SUM_TILES = tuple(
    ProductTile(*tile) for tile in ((128, 128, 8, 3), (64, 128, 8, 3), (64, 64, 4, 4))
)


# Wider strips load less for each product and need more registers.
STRIPS = (Strips(4, 1), Strips(4, 0.5), Strips(8, 1))
WARPS = 4


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, dtype: torch.dtype
) -> Tensor:
    """Depthwise convolution of (N, H, W, C) and its bias, in ``dtype``."""
    return _depthwise(x, weight, bias, dilation, dtype)


def depthwise_and_cast(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`depthwise`, and ``x`` in ``dtype``."""
    cast = torch.empty_like(x, dtype=dtype)
    return _depthwise(x, weight, bias, dilation, dtype, cast=cast), cast


def depthwise_input_grad(
    grad: Tensor, weight: Tensor, dilation: int, residual: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the depthwise convolution's input plus ``residual``, in
    ``dtype``; both and ``grad`` (N, H, W, C)."""
    # Same padding, stride 1: the same convolution with the kernel turned round.
    return _depthwise(grad, weight, None, dilation, dtype, residual, flip=True)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    cast: Tensor | None = None,
    flip: bool = False,
) -> Tensor:
    """:func:`.kernels.depthwise_kernel` of (N, H, W, C)."""
    n, height, width, channels = x.shape
    size = weight.shape[-1]
    if size > LARGEST_KERNEL:
        if cast is not None:
            x = cast.copy_(x)
        out = lean.depthwise(
            x.permute(0, 3, 1, 2),
            (weight.flip(2, 3) if flip else weight).to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            dilation,
        ).permute(0, 2, 3, 1)
        return (out if residual is None else out + residual).to(dtype)
    out = torch.empty_like(x, dtype=dtype)
    if not x.numel():
        return out
    taps = torch.transpose_copy(weight.view(channels, size * size), 0, 1)
    block_c, lanes = _lanes(channels)

    def run(strips: Strips) -> None:
        strip, number = _strip(x.shape, dilation, strips)
        start(
            kernels.depthwise_kernel,
            (cdiv(channels, block_c), cdiv(number, lanes), 1),
            (x, taps, bias, residual, out, cast),
            (n, height, width, strip),
            (channels, size, dilation, flip, strips.width, lanes, block_c),
            num_warps=WARPS,
        )

    key = ('depthwise', channels, size, dilation, x.dtype, dtype, cast is None, flip)
    run(fastest(key, n * height * width, STRIPS, run))
    return out


def _lanes(channels: int) -> tuple[int, int]:
    """Channels of a program, and the strips that it walks down at once: a thread has
    one of each."""
    block_c = 32 if channels % 32 == 0 else 16
    return block_c, 32 * WARPS // block_c


def _strip(shape: Sequence[int], dilation: int, strips: Strips) -> tuple[int, int]:
    """Rows of a strip, and the number of strips, of a map (N, H, W, C)."""
    n, height, width, channels = shape
    block_c, lanes = _lanes(channels)
    across = n * dilation * cdiv(cdiv(width, dilation), strips.width)
    rows = cdiv(height, dilation)
    wanted = int(
        strips.waves
        * programs_at_once()
        * lanes
        / (dilation * across * cdiv(channels, block_c))
    )
    strip = cdiv(rows, max(1, wanted))
    return strip, across * dilation * cdiv(rows, strip)


def depthwise_weight_grad(
    x: Tensor, grad: Tensor, weight: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise weight (C, 1, K, K) and bias (C,), fp32, of
    (N, H, W, C) input and output gradient."""
    n, height, width, channels = grad.shape
    size = weight.shape[-1]
    taps = size * size
    if not grad.numel():
        zeros = grad.new_zeros(channels, taps + 1, dtype=torch.float32)
        return zeros[:, :taps].reshape(weight.shape), zeros[:, taps]
    if size > LARGEST_KERNEL:
        x_map, grad_map = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
        return (
            lean.depthwise_weight_grad(x_map, grad_map, weight, dilation).float(),
            grad.sum((0, 1, 2), dtype=torch.float32),
        )
    block_c, lanes = _lanes(channels)
    blocks = cdiv(channels, block_c)

    def run(strips: Strips) -> Tensor:
        strip, number = _strip(x.shape, dilation, strips)
        programs = min(cdiv(number, lanes), max(1, programs_at_once() // blocks))
        parts = grad.new_empty(
            programs * lanes, taps + 1, channels, dtype=torch.float32
        )
        start(
            kernels.depthwise_weight_grad_kernel,
            (blocks, programs, 1),
            (x, grad, parts),
            (n, height, width, strip, number),
            (channels, size, dilation, strips.width, lanes, block_c),
            num_warps=WARPS,
        )
        return parts.sum(0)

    key = ('depthwise_weight_grad', channels, size, dilation, x.dtype, grad.dtype)
    sums = run(fastest(key, n * height * width, STRIPS, run))
    return sums[:taps].t().reshape(weight.shape), sums[taps]


def _norm_tile(channels: int, values: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps, of ``values`` for each thread."""
    block_c = next_power_of_2(channels)
    # Not fewer values than threads: two would write what one has yet to read.
    rows = max(128 // block_c, min(32, max(1, 4096 // block_c)))
    return rows, block_c, max(4, rows * block_c // (32 * values))


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
        rows, block_c, warps = _norm_tile(channels, 32)
        start(
            kernels.layer_norm_kernel,
            (cdiv(pixels, rows), n, 1),
            (x, weight, bias, out),
            (pixels,),
            (channels, eps, out_last, rows, block_c),
            num_warps=warps,
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
    rows, block_c, warps = _norm_tile(channels, 16)
    programs = min(n * cdiv(pixels, rows), programs_at_once())
    parts = x.new_empty(2, programs, channels, dtype=torch.float32)
    start(
        kernels.layer_norm_backward_kernel,
        (programs, 1, 1),
        (grad, x, weight, bias, out, normed, parts),
        (n, pixels),
        (channels, eps, grad_last, rows, block_c),
        num_warps=warps,
        # Without this ptxas aims at 128 registers for wide rows, and spills.
        maxnreg=240,
    )
    return out, parts[0].sum(0), parts[1].sum(0)


# Rows and columns of the tiles of the kernels between the matrix products.
_BLOCK_R, _BLOCK_M = 8, 128


def _gelu_grid(n: int, pixels: int, hidden: int) -> tuple[int, int, int]:
    columns = cdiv(hidden, _BLOCK_M)
    wanted = cdiv(4 * programs_at_once(), n * columns)
    return min(cdiv(pixels, _BLOCK_R), wanted), columns, n


def gelu_scaled(x: Tensor, scale: Tensor) -> Tensor:
    """``gelu(x) * scale`` of (N, P, M) and (N, 1, M), in the dtype of ``x``."""
    n, pixels, hidden = x.shape
    out = torch.empty_like(x)
    if x.numel():
        grid = (cdiv(pixels, _BLOCK_R), cdiv(hidden, _BLOCK_M), n)
        start(
            kernels.gelu_scaled_kernel,
            grid,
            (x, scale.contiguous(), out),
            (pixels,),
            (hidden, _BLOCK_R, _BLOCK_M),
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
    start(
        kernels.gelu_sums_kernel,
        grid,
        (x, grad, parts),
        (pixels,),
        (hidden, _BLOCK_R, _BLOCK_M),
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
    start(
        kernels.gelu_backward_kernel,
        grid,
        (grad, x, scale, along, beta, grad, activation, parts),
        (pixels,),
        (hidden, _BLOCK_R, _BLOCK_M),
    )
    return grad, activation, parts.sum((0, 1))


def scaled(
    x: Tensor, scale: Tensor | None, dtype: torch.dtype, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``x * scale`` in ``dtype``, and with ``sums`` parts of its sums over samples and
    pixels, (parts, C) fp32.

    Args:
        x: (N, P, C).
        scale: (N or 1, 1, C or 1) fp32, or None for 1.
    """
    n, pixels, channels = x.shape
    if scale is None and x.dtype == dtype:
        return x, x.sum((0, 1), dtype=torch.float32)[None] if sums else None
    out = torch.empty_like(x, dtype=dtype)
    if not x.numel():
        return out, x.new_zeros(1, channels, dtype=torch.float32)
    columns = cdiv(channels, _BLOCK_M)
    wanted = cdiv(programs_at_once(), columns)
    programs = min(n * cdiv(pixels, 2 * _BLOCK_R), wanted)
    parts = x.new_empty(programs, channels, dtype=torch.float32) if sums else None
    of_sample, of_channel = 0, 0
    if scale is not None:
        of_sample = scale.stride(0) if scale.shape[0] > 1 else 0
        of_channel = scale.stride(2) if scale.shape[2] > 1 else 0
    start(
        kernels.scaled_kernel,
        (programs, columns, 1),
        (x, scale, out, parts),
        (n, pixels),
        (channels, of_sample, of_channel, 2 * _BLOCK_R, _BLOCK_M),
    )
    return out, parts


def sum_product(a: Tensor, b: Tensor) -> Tensor:
    """Parts of ``sum over samples and pixels of a^T b``, (N, P, A) and (N, P, B) to
    (parts, A, B), fp32: PyTorch's product, or one whose pixels programs share.

    Where PyTorch can leave it in fp32 it is never rounded to 16 bit, which for
    the sums of a large map would overflow in fp16.
    """
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    rows = a.shape[0]

    def run(tile: ProductTile | None) -> Tensor:
        if tile is None:
            if a.is_cuda and a.dtype != torch.float32 and _MM_INTO_FP32:
                return torch.mm(a.t(), b, out_dtype=torch.float32)[None]
            return torch.mm(a.t(), b).float()[None]
        blocks = cdiv(a.shape[1], tile.rows) * cdiv(b.shape[1], tile.columns)
        # As many as a device holds at once of 8 warps.
        splits = max(1, programs_at_once() // 2 // blocks)
        parts = a.new_empty(splits, a.shape[1], b.shape[1], dtype=torch.float32)
        widen = INTERPRETED and a.dtype == torch.bfloat16
        start(
            kernels.product_kernel,
            (blocks, splits, 1),
            (a, b, parts),
            (rows,),
            (a.shape[1], b.shape[1], tile.rows, tile.columns, 64, widen),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return parts

    candidates: tuple[ProductTile | None, ...] = (None,)
    if a.dtype != torch.float32 and rows:
        candidates += SUM_TILES
    key = ('sum_product', a.shape[1], b.shape[1], a.dtype)
    return run(fastest(key, rows, candidates, run))


def pwconv2_grads(
    parts: Tensor,
    sum_parts: Tensor,
    power: Tensor | None,
    weights: BlockWeights,
    need_gamma: bool,
) -> dict[str, Tensor]:
    """:func:`convnext_mm.ops.fused.pwconv2_grads` of the parts of its first two
    arguments: (parts, C, M) and (parts, C)."""
    _, channels, hidden = parts.shape
    weight = parts.new_empty(channels, hidden)
    bias = parts.new_empty(channels)
    grads = dict(pwconv2_weight=weight, pwconv2_bias=bias)
    if need_gamma and weights.gamma is not None:
        grads['gamma'] = torch.empty_like(bias)
    start(
        kernels.pwconv2_grads_kernel,
        (channels, 1, 1),
        (
            parts,
            sum_parts,
            power,
            weights.pwconv2_weight.contiguous(),
            weights.pwconv2_bias,
            weights.gamma,
            weight,
            bias,
            grads.get('gamma'),
        ),
        (parts.shape[0], sum_parts.shape[0]),
        (channels, hidden, 8, min(512, next_power_of_2(hidden))),
        num_warps=4,
    )
    return grads


class Product(NamedTuple):
    """``x W^T + b`` and what follows it, see :func:`.kernels.linear_kernel`.

    Attributes:
        x: (N, P, K).
        weight: (M, K), any strides.
        out_dtype: Of the output.
        second: Whether there is a second output.
        sums: Whether the output's sum over rows is wanted.
        hidden, residual: (N, P, M), or None.
        gamma, drop: (M,) and (N,), fp32, or None for 1.
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
    gamma: Tensor | None = None
    drop: Tensor | None = None


Outputs = tuple[Tensor, Tensor | None, Tensor | None]


def _fastest_product(product: Product, library: Callable[[], Outputs]) -> Outputs:
    """The output, the second one and the sums: of ``library``, which is PyTorch's
    product and what follows it, or of one kernel, whichever is faster. fp32 is
    PyTorch's alone, which knows the user's choice on TF32.
    """
    x, columns = product.x, product.weight.shape[0]

    def run(tile: ProductTile | None) -> Outputs:
        return library() if tile is None else _one_kernel(product, tile)

    candidates: tuple[ProductTile | None, ...] = (None,)
    if x.dtype != torch.float32 and x.numel():
        candidates += PRODUCT_TILES[product.epilogue]
    key = (product.epilogue, x.shape[2], columns, x.dtype, product.second)
    return run(fastest(key, x.shape[0] * x.shape[1], candidates, run))


def _one_kernel(product: Product, tile: ProductTile) -> Outputs:
    x, weight = product.x, product.weight
    n, pixels, inner = x.shape
    rows, columns = n * pixels, weight.shape[0]
    row_blocks = cdiv(rows, tile.rows)
    out = x.new_empty(n, pixels, columns, dtype=product.out_dtype)
    second = sums = None
    if product.second:
        second = x.new_empty(n, pixels, columns)
    if product.sums:
        sums = x.new_empty(row_blocks, columns, dtype=torch.float32)
    block_k = 64 if inner % 64 == 0 else 32
    start(
        kernels.linear_kernel,
        (row_blocks * cdiv(columns, tile.columns), 1, 1),
        (
            x,
            weight,
            product.bias,
            product.hidden,
            product.residual,
            product.gamma,
            product.drop,
            out,
            second,
            sums,
        ),
        (rows, pixels),
        (
            columns,
            inner,
            weight.stride(1),
            weight.stride(0),
            inner % block_k == 0,
            product.epilogue,
            tile.rows,
            tile.columns,
            block_k,
            8,
            INTERPRETED and x.dtype == torch.bfloat16,
        ),
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
        weight: (M, K), in the dtype of ``x``.
        bias: (M,), in any.
    """

    def library() -> Outputs:
        y = F.linear(x, weight, bias.to(x.dtype))
        return F.gelu(y), y if keep else None, None

    product = Product('gelu', x, weight, bias, x.dtype, second=keep)
    return _fastest_product(product, library)[:2]


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    drop: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``residual + drop * gamma * (x W^T + b)``.

    Args:
        x: (N, P, M).
        weight: (C, M), in the dtype of ``x``.
        bias: (C,), in any.
        residual: (N, P, C).
        gamma, drop: (C,) and (N,), or None for 1.
    """

    def library() -> Outputs:
        y = F.linear(x, weight, bias.to(x.dtype))
        out = residual.new_empty(residual.shape, dtype=out_dtype)
        scale = residual_scale(gamma, drop)
        if scale is None:
            return torch.add(residual, y, out=out), None, None
        return torch.addcmul(residual, y, scale, out=out), None, None

    product = Product(
        'residual',
        x,
        weight,
        bias,
        out_dtype,
        residual=residual,
        gamma=gamma,
        drop=drop,
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
