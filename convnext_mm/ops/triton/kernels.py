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

SIZES = (
    'samples',
    'height',
    'width',
    'strip',
    'strips',
    'pixels',
    'rows',
    'parts',
    'sum_parts',
)


def jit(function):
    """``triton.jit`` that never compiles anew for another size of the map."""
    return triton.jit(
        function,
        do_not_specialize=[
            name for name in inspect.signature(function).parameters if name in SIZES
        ],
    )


@triton.jit
def _tail(x):
    """Of the normal distribution, for 16-bit maps: ``u``, which is ``|x|`` but 5.5 at
    most; ``exp(-x * x / 2)``; and the probability of a value above ``|x|``.

    The last is the second times a polynomial in ``u``, fitted to
    ``erfcx(u / sqrt(2)) / 2`` so that :func:`_gelu` is off by 2.7e-4 of its value and
    2.2e-8 at most: less than a unit in the last place of fp16 (0.73 of one).
    """
    u = tl.minimum(tl.abs(x), 5.5)
    bell = tl.exp2(x * (x * -0.7213475204444817))
    tail = tl.fma(u, -3.477801395e-05, 7.203161042e-04)
    tail = tl.fma(u, tail, -6.382069381e-03)
    tail = tl.fma(u, tail, 3.210613539e-02)
    tail = tl.fma(u, tail, -1.037663666e-01)
    tail = tl.fma(u, tail, 2.345676953e-01)
    tail = tl.fma(u, tail, -3.955119893e-01)
    tail = tl.fma(u, tail, 4.998525361e-01)
    return u, bell, tail * bell


@triton.jit
def _gelu(x, EXACT: tl.constexpr):
    """GELU of fp32 values; not EXACT: as near as 16-bit maps can tell."""
    if EXACT:
        gelu = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        u, _, tail = _tail(x)
        gelu = tl.fma(-u, tail, tl.maximum(x, 0.0))
    return gelu


@triton.jit
def _gelu_and_slope(x, EXACT: tl.constexpr):
    """:func:`_gelu` and its derivative."""
    if EXACT:
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        # At infinity the derivative is 1 or 0, not infinity times 0.
        slope = tl.where(tl.abs(x) < 20.0, cdf + x * density, cdf)
        gelu = x * cdf
    else:
        u, bell, tail = _tail(x)
        gelu = tl.fma(-u, tail, tl.maximum(x, 0.0))
        # That of -|x|; the two of x and -x sum to 1.
        slope = tl.fma(u * -0.3989422804014327, bell, tail)
        slope = tl.where(x < 0, slope, 1 - slope)
    return gelu, slope


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
def _strips(
    first,
    samples,
    height,
    width,
    strip,
    CHANNELS: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_W: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """LANES strips of a map (N, H, W, C), from the one numbered ``first`` on, each
    TILE_W columns wide and ``strip`` rows high, of BLOCK_C channels. With dilation d
    its rows and columns are d apart, so that its outputs share inputs.

    Returns:
        Where its sample starts, its first row, its first column, and the width of the
        map, or 0 beyond the last strip or channel: all (LANES, BLOCK_C), as all that
        the depthwise kernels hold. (Broadcasts cost Triton layouts, and time.)
    """
    zeros = tl.zeros((LANES, BLOCK_C), tl.int32)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :] + zeros
    number = first + tl.arange(0, LANES)[:, None] + zeros
    across = DILATION * tl.cdiv(tl.cdiv(width, DILATION), TILE_W)
    down = DILATION * tl.cdiv(tl.cdiv(height, DILATION), strip)
    column = number % across
    left = (column // DILATION) * (TILE_W * DILATION) + column % DILATION
    number = number // across
    row = number % down
    top = (row // DILATION) * (strip * DILATION) + row % DILATION
    sample = number // down
    limit = tl.where((sample < samples) & (channel < CHANNELS), width, 0)
    start = sample.to(tl.int64) * (height * width) * CHANNELS + channel
    return start, top, left, limit


@triton.jit
def _within(column, limit):
    """``0 <= column < limit``, in one comparison."""
    return column.to(tl.uint32) < limit.to(tl.uint32)


@triton.jit
def _load_row(
    x_ptr,
    row_start,
    left,
    limit,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_W: tl.constexpr,
):
    """The inputs in fp32 that TILE_W outputs of a row touch, as a tuple of columns.
    ``row_start`` is where the first of them lies, outside the map perhaps."""
    values = ()
    for c in tl.static_range(TILE_W + KERNEL - 1):
        values = values + (
            tl.load(
                x_ptr + row_start + c * (DILATION * CHANNELS),
                _within(left + (c - KERNEL // 2) * DILATION, limit),
                other=0.0,
            ).to(tl.float32),
        )
    return values


@jit
def depthwise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    cast_ptr,
    samples,
    height,
    width,
    strip,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    FLIP: tl.constexpr,
    TILE_W: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Depthwise convolution of (N, H, W, C), stride 1, size kept; then its bias and
    a residual, each where its pointer is not None.

    A thread owns one channel, all of its weights, and a strip of TILE_W columns. It
    walks down the strip. Each input is loaded once for the K * min(K, TILE_W)
    products, about, that it has with outputs of the K rows that are under way; the
    topmost of these is then complete.

    Args:
        weight_ptr: (K * K, C).
        residual_ptr: (N, H, W, C), of any floating dtype.
        cast_ptr: None, or (N, H, W, C), where the input goes in another dtype.
        FLIP: Turn the kernel round: the gradient of the input.
    """
    HALF: tl.constexpr = KERNEL // 2
    start, top, left, limit = _strips(
        tl.program_id(1) * LANES,
        samples,
        height,
        width,
        strip,
        CHANNELS,
        DILATION,
        TILE_W,
        LANES,
        BLOCK_C,
    )
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    channel += tl.zeros((LANES, BLOCK_C), tl.int32)
    channel_ok = channel < CHANNELS
    weights = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (
            tl.load(
                weight_ptr
                + (KERNEL * KERNEL - 1 - tap if FLIP else tap) * CHANNELS
                + channel,
                channel_ok,
                other=0.0,
            ).to(tl.float32),
        )
    bias = tl.zeros((LANES, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, channel_ok, other=0.0).to(tl.float32)
    # Row by row; the first TILE_W are the topmost row's.
    sums = (bias,) * (KERNEL * TILE_W)
    bottom = tl.minimum(top + strip * DILATION, height)
    row = top - HALF * DILATION
    in_start = start + (row * width + left - HALF * DILATION) * CHANNELS
    out_start = start + ((row - HALF * DILATION) * width + left) * CHANNELS
    for _ in range(strip + KERNEL - 1):
        row_limit = tl.where(_within(row, height), limit, 0)
        values = _load_row(
            x_ptr, in_start, left, row_limit, CHANNELS, KERNEL, DILATION, TILE_W
        )
        updated = ()
        for i in tl.static_range(KERNEL - 1, -1, -1):
            for w in tl.static_range(TILE_W):
                total = sums[(KERNEL - 1 - i) * TILE_W + w]
                for j in tl.static_range(KERNEL):
                    total = tl.fma(values[w + j], weights[i * KERNEL + j], total)
                updated = updated + (total,)
        if cast_ptr is not None:
            own_limit = tl.where((row >= top) & (row < bottom), limit, 0)
            for w in tl.static_range(TILE_W):
                tl.store(
                    cast_ptr + in_start + (w + HALF) * (DILATION * CHANNELS),
                    values[w + HALF].to(cast_ptr.dtype.element_ty),
                    left + w * DILATION < own_limit,
                )
        out_row = row - HALF * DILATION
        out_limit = tl.where((out_row >= top) & (out_row < bottom), limit, 0)
        for w in tl.static_range(TILE_W):
            offset = out_start + w * (DILATION * CHANNELS)
            ok = left + w * DILATION < out_limit
            result = updated[w]
            if residual_ptr is not None:
                result += tl.load(residual_ptr + offset, ok, other=0.0).to(tl.float32)
            tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), ok)
        sums = updated[TILE_W:] + (bias,) * TILE_W
        row += DILATION
        in_start += DILATION * width * CHANNELS
        out_start += DILATION * width * CHANNELS


@jit
def depthwise_weight_grad_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    samples,
    height,
    width,
    strip,
    strips,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    DILATION: tl.constexpr,
    TILE_W: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial gradients of the depthwise weight and bias.

    A thread owns one channel and the sums of all of its weights. It walks down
    strips of TILE_W columns with the K rows of the output's gradient that an input
    row touches, and loads each value of both once for a strip. A gradient that is
    not finite makes NaN also of weights that met the padding there alone.

    Args:
        x_ptr, grad_ptr: (N, H, W, C), the input and the output's gradient.
        out_ptr: (programs along 1, LANES, K * K + 1, C) fp32, the bias's part last.
        strips: In all samples.
    """
    HALF: tl.constexpr = KERNEL // 2
    TAPS: tl.constexpr = KERNEL * KERNEL
    zeros = tl.zeros((LANES, BLOCK_C), tl.float32)
    sums = (zeros,) * (TAPS + 1)
    first = tl.program_id(1) * LANES
    for number in range(first, strips, tl.num_programs(1) * LANES):
        start, top, left, limit = _strips(
            number,
            samples,
            height,
            width,
            strip,
            CHANNELS,
            DILATION,
            TILE_W,
            LANES,
            BLOCK_C,
        )
        bottom = tl.minimum(top + strip * DILATION, height)
        row = top - HALF * DILATION
        in_start = start + (row * width + left - HALF * DILATION) * CHANNELS
        grad_start = start + (top * width + left) * CHANNELS
        grads = (zeros,) * (KERNEL * TILE_W)
        for _ in range(strip + KERNEL - 1):
            # The strip's rows alone: others belong to other strips.
            grad_limit = tl.where(row + HALF * DILATION < bottom, limit, 0)
            grads = grads[TILE_W:]
            for w in tl.static_range(TILE_W):
                grads = grads + (
                    tl.load(
                        grad_ptr + grad_start + w * (DILATION * CHANNELS),
                        left + w * DILATION < grad_limit,
                        other=0.0,
                    ).to(tl.float32),
                )
            row_limit = tl.where(_within(row, height), limit, 0)
            values = _load_row(
                x_ptr, in_start, left, row_limit, CHANNELS, KERNEL, DILATION, TILE_W
            )
            updated = ()
            for i in tl.static_range(KERNEL):
                for j in tl.static_range(KERNEL):
                    total = sums[i * KERNEL + j]
                    for w in tl.static_range(TILE_W):
                        grad = grads[(KERNEL - 1 - i) * TILE_W + w]
                        total = tl.fma(values[w + j], grad, total)
                    updated = updated + (total,)
            total = sums[TAPS]
            for w in tl.static_range(TILE_W):
                total += grads[(KERNEL - 1) * TILE_W + w]
            sums = updated + (total,)
            row += DILATION
            in_start += DILATION * width * CHANNELS
            grad_start += DILATION * width * CHANNELS
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    part = (first + tl.arange(0, LANES)[:, None]).to(tl.int64) * ((TAPS + 1) * CHANNELS)
    for tap in tl.static_range(TAPS + 1):
        tl.store(
            out_ptr + part + tap * CHANNELS + channel, sums[tap], channel < CHANNELS
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
    sums_ptr,
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
        sums_ptr: (2, programs, C) fp32, of the weight and of the bias.
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
    sums_ptr += program * channels
    tl.store(sums_ptr + channel, tl.sum(weight_sum, 0), channel_ok)
    sums_ptr += tl.num_programs(0) * channels
    tl.store(sums_ptr + channel, tl.sum(bias_sum, 0), channel_ok)


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
    first = tl.program_id(0) * BLOCK_R
    tile_row = tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_ok = column < hidden
    base = (sample * pixels + first) * hidden
    offset = tile_row[:, None] * hidden + column[None, :]
    ok = (first + tile_row < pixels)[:, None] & column_ok[None, :]
    scale = tl.load(scale_ptr + sample * hidden + column, column_ok, other=0.0)
    h = _gelu(
        tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32),
        x_ptr.dtype.element_ty == tl.float32,
    )
    tl.store(
        out_ptr + base + offset, (h * scale[None, :]).to(out_ptr.dtype.element_ty), ok
    )


@jit
def gelu_sums_kernel(
    x_ptr,
    grad_ptr,
    out_ptr,
    pixels,
    hidden,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Partial sums over pixels that GRN needs, one for each program along 0.

    Args:
        x_ptr: (N, P, M), the pre-activation; ``h = gelu(x)``.
        grad_ptr: None, or (N, P, M).
        out_ptr: (1, programs, N, M) fp32: sums of ``h * h``. With ``grad``
            (2, programs, N, M): sums of ``h * grad``, and of ``grad``.
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
        h = _gelu(
            tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32),
            x_ptr.dtype.element_ty == tl.float32,
        )
        if grad_ptr is not None:
            grad = tl.load(grad_ptr + base + offset, ok, other=0.0).to(tl.float32)
            grad_total += grad
            total += h * grad
        else:
            total += h * h
    part = tl.program_id(0) * tl.num_programs(2) + sample
    tl.store(out_ptr + part * hidden + column, tl.sum(total, 0), column_ok)
    if grad_ptr is not None:
        part += tl.num_programs(0) * tl.num_programs(2)
        tl.store(out_ptr + part * hidden + column, tl.sum(grad_total, 0), column_ok)


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
            tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32),
            x_ptr.dtype.element_ty == tl.float32,
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
    gamma_ptr,
    drop_ptr,
    out_ptr,
    second_out_ptr,
    bias_out_ptr,
    rows,
    pixels,
    columns,
    inner,
    weight_inner,
    weight_column,
    EVEN: tl.constexpr,
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
        EVEN: K is a multiple of BLOCK_K.
        EPILOGUE: ``'gelu'``: ``out = gelu(y)``, and ``y`` to ``second_out``
            unless that is None. ``'residual'``: ``out = residual + drop * gamma *
            y``, ``gamma`` (N,) and ``drop`` (samples,), or None.
            ``'gelu_backward'``: ``out = y * gelu'(hidden)``, ``gelu(hidden)``
            to ``second_out`` unless that is None, and for each block of rows
            the sums of ``out`` to ``bias_out`` (blocks, N), fp32.
        pixels: Of a sample.
        WIDEN: Multiply in fp32: Triton's interpreter multiplies the bits of
            bf16 numbers as if they were integers.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
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
    k = tl.arange(0, BLOCK_K)
    start_row = (row_block * BLOCK_R).to(tl.int64)
    row_ok = row_block * BLOCK_R + tile_row < rows
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = column < columns
    x_tile = x_ptr + start_row * inner + tile_row[:, None] * inner + k[None, :]
    weight_tile = (
        weight_ptr + k[:, None] * weight_inner + column[None, :] * weight_column
    )
    y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        if EVEN:
            x = tl.load(x_tile, row_ok[:, None], other=0.0)
            weight = tl.load(weight_tile, column_ok[None, :], other=0.0)
        else:
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
        bias = tl.load(bias_ptr + column, column_ok, other=0.0)
        y += bias.to(tl.float32)[None, :]
    if EPILOGUE == 'gelu':
        # Of the rounded value: backward has no other.
        y = y.to(out_ptr.dtype.element_ty)
        if second_out_ptr is not None:
            tl.store(second_out_ptr + base + offset, y, ok)
        out = _gelu(y.to(tl.float32), EXACT)
    elif EPILOGUE == 'residual':
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + column, column_ok, other=0.0)
            y *= gamma.to(tl.float32)[None, :]
        if drop_ptr is not None:
            sample = (row_block * BLOCK_R + tile_row) // pixels
            y *= tl.load(drop_ptr + sample, row_ok, other=0.0)[:, None]
        out = tl.load(residual_ptr + base + offset, ok, other=0.0).to(tl.float32)
        out += y
    else:
        h, slope = _gelu_and_slope(
            tl.load(hidden_ptr + base + offset, ok, other=0.0).to(tl.float32), EXACT
        )
        out = y * slope
        if second_out_ptr is not None:
            h = h.to(second_out_ptr.dtype.element_ty)
            tl.store(second_out_ptr + base + offset, h, ok)
        tl.store(bias_out_ptr + row_block * columns + column, tl.sum(out, 0), column_ok)
    tl.store(out_ptr + base + offset, out.to(out_ptr.dtype.element_ty), ok)


@jit
def product_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    a_columns,
    b_columns,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Parts of ``sum over rows of a^T b``, one for each program along 1.

    Args:
        a_ptr, b_ptr: (R, A) and (R, B).
        out_ptr: (programs along 1, A, B), fp32.
        WIDEN: As in :func:`linear_kernel`.
    """
    b_blocks = tl.cdiv(b_columns, BLOCK_B)
    a_column = (tl.program_id(0) // b_blocks) * BLOCK_A + tl.arange(0, BLOCK_A)
    b_column = (tl.program_id(0) % b_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(rows, BLOCK_K), tl.num_programs(1))
    first = tl.program_id(1) * steps * BLOCK_K
    a_tile = a_ptr + (first + k).to(tl.int64)[None, :] * a_columns + a_column[:, None]
    b_tile = b_ptr + (first + k).to(tl.int64)[:, None] * b_columns + b_column[None, :]
    out = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for step in range(steps):
        row_ok = first + step * BLOCK_K + k < rows
        a = tl.load(
            a_tile, row_ok[None, :] & (a_column < a_columns)[:, None], other=0.0
        )
        b = tl.load(
            b_tile, row_ok[:, None] & (b_column < b_columns)[None, :], other=0.0
        )
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        out = tl.dot(a, b, out)
        a_tile += BLOCK_K * a_columns
        b_tile += BLOCK_K * b_columns
    part = tl.program_id(1).to(tl.int64) * a_columns * b_columns
    tl.store(
        out_ptr + part + a_column[:, None] * b_columns + b_column[None, :],
        out,
        (a_column < a_columns)[:, None] & (b_column < b_columns)[None, :],
    )


@jit
def scaled_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    sums_ptr,
    samples,
    pixels,
    channels,
    scale_sample,
    scale_channel,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``x * scale`` in another dtype, (N, P, C), and its sums over pixels.

    Args:
        scale_ptr: (samples or 1, C or 1) by its strides, fp32, or None for 1.
        sums_ptr: None, or (programs along 0, C) fp32, one part for each.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    tile_row = tl.arange(0, BLOCK_R)
    offset = tile_row[:, None] * channels + channel[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    blocks = tl.cdiv(pixels, BLOCK_R)
    for block in range(tl.program_id(0), samples * blocks, tl.num_programs(0)):
        sample = (block // blocks).to(tl.int64)
        start = (block % blocks) * BLOCK_R
        base = (sample * pixels + start) * channels
        ok = (start + tile_row < pixels)[:, None] & channel_ok[None, :]
        x = tl.load(x_ptr + base + offset, ok, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(
                scale_ptr + sample * scale_sample + channel * scale_channel,
                channel_ok,
                other=0.0,
            )
            x *= scale[None, :]
        x = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + offset, x, ok)
        total += x.to(tl.float32)
    if sums_ptr is not None:
        tl.store(
            sums_ptr + tl.program_id(0) * channels + channel,
            tl.sum(total, 0),
            channel_ok,
        )


@triton.jit
def _sum_parts(ptr, parts, step, column, column_ok, BLOCK_P: tl.constexpr):
    """Of (parts, columns), ``step`` apart."""
    total = tl.zeros(column.shape, tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        values = tl.load(
            ptr + part.to(tl.int64)[:, None] * step + column[None, :],
            (part < parts)[:, None] & column_ok[None, :],
            other=0.0,
        )
        total += tl.sum(values, 0)
    return total


@jit
def pwconv2_grads_kernel(
    parts_ptr,
    sum_parts_ptr,
    power_ptr,
    weight_ptr,
    bias_ptr,
    gamma_ptr,
    weight_out_ptr,
    bias_out_ptr,
    gamma_out_ptr,
    parts,
    sum_parts,
    channels,
    hidden,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradients of W2, b2 and gamma, a row of W2 in each program: see
    :mod:`convnext_mm.ops.fused`.

    Args:
        parts_ptr: (parts, C, M) fp32, of ``(drop * dout)^T h``.
        sum_parts_ptr: (sum_parts, C) fp32, of the sums of ``drop * dout``.
        power_ptr: None, or one value that both were divided by.
        weight_ptr, bias_ptr: W2 (C, M) and b2 (C,).
        gamma_ptr: (C,), or None for 1.
        gamma_out_ptr: (C,) fp32, or None.
    """
    channel = tl.program_id(0)
    power = 1.0
    if power_ptr is not None:
        power = tl.load(power_ptr)
    gamma = 1.0
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + channel).to(tl.float32)
    one = channel + tl.arange(0, 1)
    total = _sum_parts(sum_parts_ptr, sum_parts, channels, one, one >= 0, 256)
    total = tl.sum(total, 0) * power
    tl.store(bias_out_ptr + channel, total * gamma)
    along = tl.zeros((BLOCK_M,), tl.float32)
    row = channel * hidden
    for start in range(0, hidden, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        column_ok = column < hidden
        g = power * _sum_parts(
            parts_ptr, parts, channels * hidden, row + column, column_ok, BLOCK_P
        )
        tl.store(weight_out_ptr + row + column, g * gamma, column_ok)
        if gamma_out_ptr is not None:
            weight = tl.load(weight_ptr + row + column, column_ok, other=0.0)
            along += g * weight.to(tl.float32)
    if gamma_out_ptr is not None:
        bias = tl.load(bias_ptr + channel).to(tl.float32)
        tl.store(gamma_out_ptr + channel, tl.sum(along, 0) + total * bias)
