"""Triton kernels of the ConvNeXt block, for channels-last maps.

Every sum runs in fp32 and in a fixed order: no kernel uses atomics. What a map
holds is called pixels, P of them in a sample, C channels or M hidden ones.

Offsets within a tile are 32-bit, which halves their registers; where a tile or
a sample starts is a 64-bit scalar. So one sample's map has less than 2**31
values, hidden channels included: :data:`.LARGEST_MAP`.

Sizes of maps change from step to step in multi-scale training: they must not
become part of a compiled kernel, so the kernels that take them name them in
``do_not_specialize``.
"""

import inspect

import triton
import triton.language as tl

SIZES = ('samples', 'height', 'width', 'pixels', 'rows')


def jit(function):
    """``triton.jit`` that never compiles anew for another size of the map."""
    return triton.jit(
        function,
        do_not_specialize=[
            name for name in inspect.signature(function).parameters if name in SIZES
        ],
    )


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_and_slope(x):
    """GELU and its derivative."""
    cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    # At infinity the derivative is 1 or 0, not infinity times 0.
    slope = tl.where(tl.abs(x) < 20.0, cdf + x * density, cdf)
    return x * cdf, slope


@triton.jit
def _offset(pixel, channel, pixels, channels, CHANNELS_LAST: tl.constexpr):
    """Where pixels and channels lie in a sample (P, C) or (C, P)."""
    if CHANNELS_LAST:
        return pixel[:, None] * channels + channel[None, :]
    return channel[None, :] * pixels + pixel[:, None]


@triton.jit
def _mean_and_rstd(x, channel_ok, channels, eps):
    """Of the rows of (R, C) in registers; columns beyond C are 0."""
    mean = tl.sum(x, 1) / channels
    centred = tl.where(channel_ok[None, :], x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    return mean, rstd


@triton.jit
def _within(row, height, like):
    """Whether a map has a row, as a block like another: Triton's interpreter takes
    one comparison of its own for an integer, which no mask may be."""
    rows = row + tl.zeros_like(like)
    return (rows >= 0) & (rows < height)


@jit
def depthwise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    normed_ptr,
    height,
    width,
    channels,
    eps,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    FLIP: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Depthwise convolution of (N, H, W, C), stride 1, size kept; then its
    bias, a residual and LayerNorm, each where its pointer is not None.

    A program computes TILE_H x TILE_W outputs of BLOCK_C channels. It walks
    over the kernel's columns, holds one column of weights in registers, and
    loads each input of the column once for the TILE_H outputs that it touches.
    With dilation d the rows of a tile are d apart, so that they share inputs.

    Args:
        weight_ptr: (K * K, C).
        residual_ptr: (N, H, W, C), of any floating dtype.
        normed_ptr: None, or where LayerNorm of the output goes; BLOCK_C then
            covers all channels.
        out_ptr: May be None with ``normed_ptr``.
        FLIP: Turn the kernel round: the gradient of the input.
    """
    tiles_w = tl.cdiv(width, TILE_W)
    tile_rows = DILATION * tl.cdiv(tl.cdiv(height, DILATION), TILE_H)
    tile = tl.program_id(0)
    column = (tile % tiles_w) * TILE_W + tl.arange(0, TILE_W)
    tile = tile // tiles_w
    base = (tile // tile_rows).to(tl.int64) * height * width * channels
    tile = tile % tile_rows
    top = (tile // DILATION) * (TILE_H * DILATION) + tile % DILATION
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels

    accumulators = (tl.zeros((TILE_W, BLOCK_C), tl.float32),) * TILE_H
    # Not unrolled: that compiles ten times as long, into code too large for
    # the instruction caches.
    for j in range(KERNEL):
        weights = ()
        for i in tl.static_range(KERNEL):
            tap = i * KERNEL + j if not FLIP else KERNEL * KERNEL - 1 - (i * KERNEL + j)
            weights = weights + (
                tl.load(
                    weight_ptr + tap * channels + channel, channel_ok, other=0.0
                ).to(tl.float32),
            )
        source = column + (j - KERNEL // 2) * DILATION
        source_ok = (source >= 0) & (source < width) & (column < width)
        for r in tl.static_range(KERNEL + TILE_H - 1):
            row = top + (r - KERNEL // 2) * DILATION
            pixel = row * width + source
            values = tl.load(
                x_ptr + base + pixel[:, None] * channels + channel[None, :],
                (_within(row, height, column) & source_ok)[:, None]
                & channel_ok[None, :],
                other=0.0,
            ).to(tl.float32)
            updated = ()
            for o in tl.static_range(TILE_H):
                if r - o >= 0 and r - o < KERNEL:
                    updated = updated + (
                        accumulators[o] + values * weights[r - o][None, :],
                    )
                else:
                    updated = updated + (accumulators[o],)
            accumulators = updated

    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, channel_ok, other=0.0).to(tl.float32)
    if normed_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + channel, channel_ok, other=0.0).to(
            tl.float32
        )
        norm_bias = tl.load(norm_bias_ptr + channel, channel_ok, other=0.0).to(
            tl.float32
        )
    for o in tl.static_range(TILE_H):
        row = top + o * DILATION
        pixel = row * width + column
        offset = pixel[:, None] * channels + channel[None, :]
        row_ok = _within(row, height, column)
        ok = (row_ok & (column < width))[:, None] & channel_ok[None, :]
        result = accumulators[o] + bias[None, :]
        if residual_ptr is not None:
            result += tl.load(residual_ptr + base + offset, ok, other=0.0)
        if out_ptr is not None:
            result = result.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + base + offset, result, ok)
        if normed_ptr is not None:
            # Of the rounded map: backward has no other.
            result = result.to(normed_ptr.dtype.element_ty).to(tl.float32)
            mean, rstd = _mean_and_rstd(result, channel_ok, channels, eps)
            result = (result - mean[:, None]) * rstd[:, None] * norm_weight[
                None, :
            ] + norm_bias[None, :]
            tl.store(
                normed_ptr + base + offset, result.to(normed_ptr.dtype.element_ty), ok
            )


@jit
def depthwise_weight_grad_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    bias_out_ptr,
    height,
    width,
    rows,
    channels,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial gradients of the depthwise weight and bias.

    A program sums one row of the kernel over a share of the N * H map rows.

    Args:
        x_ptr, grad_ptr: (N, H, W, C), the input and the output's gradient.
        out_ptr: (S, K * K, C) fp32, one part for each of S shares.
        bias_out_ptr: (S, C) fp32.
        rows: N * H.
    """
    i = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    share = tl.program_id(2)
    per_share = tl.cdiv(rows, tl.num_programs(2))
    column = tl.arange(0, TILE_W)

    sums = (tl.zeros((TILE_W, BLOCK_C), tl.float32),) * KERNEL
    bias_sum = tl.zeros((TILE_W, BLOCK_C), tl.float32)
    end = tl.minimum((share + 1) * per_share, rows)
    wide = width.to(tl.int64)
    for row in range(share * per_share, end):
        shift = (i - KERNEL // 2) * DILATION
        source_row = row % height + shift
        row_ok = _within(source_row, height, column)
        start = row * wide * channels
        source_start = (row + shift) * wide * channels
        for left in range(0, width, TILE_W):
            inside = left + column < width
            pixel = left + column
            grad = tl.load(
                grad_ptr + start + pixel[:, None] * channels + channel[None, :],
                inside[:, None] & channel_ok[None, :],
                other=0.0,
            ).to(tl.float32)
            bias_sum += grad
            updated = ()
            for j in tl.static_range(KERNEL):
                source = left + column + (j - KERNEL // 2) * DILATION
                ok = row_ok & inside & (source >= 0) & (source < width)
                values = tl.load(
                    x_ptr
                    + source_start
                    + source[:, None] * channels
                    + channel[None, :],
                    ok[:, None] & channel_ok[None, :],
                    other=0.0,
                ).to(tl.float32)
                # Not 0 * gradient: that may be infinite.
                updated = updated + (
                    sums[j] + tl.where(ok[:, None], values * grad, 0.0),
                )
            sums = updated
    for j in tl.static_range(KERNEL):
        tap = (share * KERNEL + i) * KERNEL + j
        tl.store(out_ptr + tap * channels + channel, tl.sum(sums[j], 0), channel_ok)
    if i == 0:
        tl.store(
            bias_out_ptr + share * channels + channel, tl.sum(bias_sum, 0), channel_ok
        )


@jit
def layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    channels,
    eps,
    OUT_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """LayerNorm over the channels of (N, P, C), into (N, P, C) or, without
    OUT_LAST, (N, C, P)."""
    base = tl.program_id(1).to(tl.int64) * pixels * channels
    pixel = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    ok = (pixel < pixels)[:, None] & channel_ok[None, :]
    x = tl.load(
        x_ptr + base + _offset(pixel, channel, pixels, channels, True), ok, other=0.0
    ).to(tl.float32)
    weight = tl.load(weight_ptr + channel, channel_ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, channel_ok, other=0.0).to(tl.float32)
    mean, rstd = _mean_and_rstd(x, channel_ok, channels, eps)
    out = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(
        out_ptr + base + _offset(pixel, channel, pixels, channels, OUT_LAST),
        out.to(out_ptr.dtype.element_ty),
        ok,
    )


@jit
def layer_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    normed_ptr,
    weight_out_ptr,
    bias_out_ptr,
    samples,
    pixels,
    channels,
    eps,
    GRAD_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of LayerNorm's input and, as one part for each program, of its
    weight and bias. Statistics are computed anew from the input.

    Args:
        grad_ptr: (N, P, C) or, without GRAD_LAST, (N, C, P).
        x_ptr: (N, P, C).
        out_ptr: (N, P, C), the input's gradient.
        normed_ptr: None, or (N, P, C): the output again, for the weight
            gradient of the layer after it. May be ``grad_ptr``.
        weight_out_ptr, bias_out_ptr: (programs, C) fp32.
    """
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    weight = tl.load(weight_ptr + channel, channel_ok, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    blocks = tl.cdiv(pixels, BLOCK_R)
    wide = pixels.to(tl.int64) * channels
    for block in range(program, samples * blocks, tl.num_programs(0)):
        base = (block // blocks) * wide
        pixel = (block % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        offset = _offset(pixel, channel, pixels, channels, True)
        ok = (pixel < pixels)[:, None] & channel_ok[None, :]
        x = tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32)
        grad = tl.load(
            grad_ptr + base + _offset(pixel, channel, pixels, channels, GRAD_LAST),
            ok,
            other=0.0,
        ).to(tl.float32)
        mean, rstd = _mean_and_rstd(x, channel_ok, channels, eps)
        unit = tl.where(ok, (x - mean[:, None]) * rstd[:, None], 0.0)
        weight_sum += grad * unit
        bias_sum += grad
        if normed_ptr is not None:
            bias = tl.load(bias_ptr + channel, channel_ok, other=0.0).to(tl.float32)
            normed = unit * weight[None, :] + bias[None, :]
            tl.store(
                normed_ptr + base + offset, normed.to(normed_ptr.dtype.element_ty), ok
            )
        grad *= weight[None, :]
        along = tl.sum(grad * unit, 1) / channels
        grad = (
            grad - tl.sum(grad, 1)[:, None] / channels - unit * along[:, None]
        ) * rstd[:, None]
        tl.store(out_ptr + base + offset, grad.to(out_ptr.dtype.element_ty), ok)
    tl.store(
        weight_out_ptr + program * channels + channel, tl.sum(weight_sum, 0), channel_ok
    )
    tl.store(
        bias_out_ptr + program * channels + channel, tl.sum(bias_sum, 0), channel_ok
    )


@jit
def gelu_scaled_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    pixels,
    hidden,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``gelu(x) * scale``: (N, P, M) and (N, M) to (N, P, M)."""
    sample = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < hidden
    base = sample * pixels * hidden
    offset = pixel[:, None] * hidden + column[None, :]
    ok = (pixel < pixels)[:, None] & column_ok[None, :]
    scale = tl.load(scale_ptr + sample * hidden + column, column_ok, other=0.0)
    h = _gelu(tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32))
    tl.store(
        out_ptr + base + offset, (h * scale[None, :]).to(out_ptr.dtype.element_ty), ok
    )


@jit
def gelu_sums_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    grad_out_ptr,
    pixels,
    hidden,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Partial sums over pixels that GRN needs, one for each program along 0.

    Args:
        x_ptr: (N, P, M), the pre-activation; ``h = gelu(x)``.
        grad_ptr: None, or (N, P, M).
        out_ptr: (programs, N, M) fp32: sums of ``h * h``, or of ``h * grad``.
        grad_out_ptr: The same, sums of ``grad``; None without it.
    """
    sample = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < hidden
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    grad_total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    tile_row = tl.arange(0, BLOCK_R)
    offset = tile_row[:, None] * hidden + column[None, :]
    step = tl.num_programs(0) * BLOCK_R
    for start in range(tl.program_id(0) * BLOCK_R, pixels, step):
        base = (sample * pixels + start) * hidden
        ok = (start + tile_row < pixels)[:, None] & column_ok[None, :]
        h = _gelu(tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32))
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + base + offset, ok, other=0.0).to(tl.float32)
            grad_total += grad
            total += h * grad
        else:
            total += h * h
    part = tl.program_id(0) * tl.num_programs(2) + sample
    tl.store(out_ptr + part * hidden + column, tl.sum(total, 0), column_ok)
    if grad_ptr is not None:
        tl.store(
            grad_out_ptr + part * hidden + column, tl.sum(grad_total, 0), column_ok
        )


@jit
def gelu_backward_kernel(
    grad_ptr,
    x_ptr,
    scale_ptr,
    along_ptr,
    beta_ptr,
    out_ptr,
    activation_ptr,
    bias_out_ptr,
    pixels,
    hidden,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Backward of GELU and, where ``scale_ptr`` is not None, of GRN before it.

    Args:
        grad_ptr, x_ptr: (N, P, M), the output's gradient, the pre-activation.
        scale_ptr, along_ptr: (N, M) fp32, GRN's factor, and the gradient
            through its norm for each unit of ``h = gelu(x)``.
        beta_ptr: (M,), GRN's.
        out_ptr: (N, P, M), gradient of the pre-activation; may be
            ``grad_ptr``.
        activation_ptr: None, or (N, P, M): the forward output again.
        bias_out_ptr: (programs along 0, N, M) fp32, sums of the gradient.
    """
    sample = tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < hidden
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample * hidden + column, column_ok, other=0.0)
        along = tl.load(along_ptr + sample * hidden + column, column_ok, other=0.0)
        beta = tl.load(beta_ptr + column, column_ok, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    tile_row = tl.arange(0, BLOCK_R)
    offset = tile_row[:, None] * hidden + column[None, :]
    step = tl.num_programs(0) * BLOCK_R
    for start in range(tl.program_id(0) * BLOCK_R, pixels, step):
        base = (sample * pixels + start) * hidden
        ok = (start + tile_row < pixels)[:, None] & column_ok[None, :]
        grad = tl.load(grad_ptr + base + offset, ok, other=0.0).to(tl.float32)
        h, slope = _gelu_and_slope(
            tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32)
        )
        if scale_ptr is not None:
            grad = grad * scale[None, :] + h * along[None, :]
            h = h * scale[None, :] + beta[None, :]
        grad *= slope
        total += grad
        tl.store(out_ptr + base + offset, grad.to(out_ptr.dtype.element_ty), ok)
        if activation_ptr is not None:
            tl.store(
                activation_ptr + base + offset,
                h.to(activation_ptr.dtype.element_ty),
                ok,
            )
    part = tl.program_id(0) * tl.num_programs(2) + sample
    tl.store(bias_out_ptr + part * hidden + column, tl.sum(total, 0), column_ok)


@jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    residual_ptr,
    scale_ptr,
    out_ptr,
    second_out_ptr,
    bias_out_ptr,
    rows,
    pixels,
    columns,
    inner,
    weight_inner,
    weight_column,
    scale_sample,
    scale_column,
    EPILOGUE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Matrix product of (R, K) rows and a weight, and what follows it.

    Args:
        weight_ptr: (K, N) of any strides.
        bias_ptr: (N,), or None.
        EPILOGUE: ``'gelu'``: ``out = gelu(y)``, and ``y`` to ``second_out``
            unless that is None. ``'residual'``: ``out = residual + scale *
            y``, scale of (samples or 1, N or 1) by its strides.
            ``'gelu_backward'``: ``out = y * gelu'(hidden)``, ``gelu(hidden)``
            to ``second_out`` unless that is None, and for each block of rows
            the sums of ``out`` to ``bias_out`` (blocks, N), fp32.
        WIDEN: Multiply in fp32: Triton's interpreter multiplies the bits of
            bf16 numbers as if they were integers.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(rows, BLOCK_R)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    # GROUP row blocks by all columns in turn, so that both operands are met
    # again while the L2 cache still has them.
    group = program // (GROUP * column_blocks)
    first = group * GROUP
    group_rows = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    row_block = first + within % group_rows
    column_block = within // group_rows

    tile_row = tl.arange(0, BLOCK_R)
    start_row = (row_block * BLOCK_R).to(tl.int64)
    row_ok = row_block * BLOCK_R + tile_row < rows
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    k = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + start_row * inner + tile_row[:, None] * inner + k[None, :]
    weight_tile = (
        weight_ptr + k[:, None] * weight_inner + column[None, :] * weight_column
    )
    y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        k_ok = start + k < inner
        x = tl.load(x_tile, row_ok[:, None] & k_ok[None, :], other=0.0)
        weight = tl.load(weight_tile, k_ok[:, None] & column_ok[None, :], other=0.0)
        if WIDEN:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        y = tl.dot(x, weight, y)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K * weight_inner

    base = start_row * columns
    offset = tile_row[:, None] * columns + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, column_ok, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == 'gelu':
        # Of the rounded value: backward has no other.
        y = y.to(out_ptr.dtype.element_ty)
        if second_out_ptr is not None:
            tl.store(second_out_ptr + base + offset, y, ok)
        out = _gelu(y.to(tl.float32))
    elif EPILOGUE == 'residual':
        if scale_ptr is not None:
            sample = (row_block * BLOCK_R + tile_row) // pixels
            y *= tl.load(
                scale_ptr
                + sample[:, None] * scale_sample
                + column[None, :] * scale_column,
                ok,
                other=0.0,
            )
        out = tl.load(residual_ptr + base + offset, ok, other=0.0).to(tl.float32) + y
    else:
        h, slope = _gelu_and_slope(
            tl.load(hidden_ptr + base + offset, ok, other=0.0).to(tl.float32)
        )
        out = y * slope
        if second_out_ptr is not None:
            tl.store(
                second_out_ptr + base + offset,
                h.to(second_out_ptr.dtype.element_ty),
                ok,
            )
        tl.store(bias_out_ptr + row_block * columns + column, tl.sum(out, 0), column_ok)
    tl.store(out_ptr + base + offset, out.to(out_ptr.dtype.element_ty), ok)
