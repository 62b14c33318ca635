"""Custom operators of PyTorch for the block and for the layer between stages.

An implementation gives both directions; ``torch.compile`` then sees one node
each, and autograd keeps what the implementation wants kept.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from convnext_mm.private_names import has

from .fused import KEEP_ALL, KEEP_NOTHING, compute_dtype, memory_format, out_dtype
from .weights import BlockNeeds, BlockWeights


def refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        'only the plain ConvNeXt block can be differentiated twice, not the '
        "fused ones ('lean', 'lean+', 'triton'); use impl='eager' for that"
    )


_counters: list[collections.Counter[str]] = []


@contextlib.contextmanager
def counted_operators() -> Iterator[collections.Counter[str]]:
    """How often each of this package's operators runs in the context, by its name:
    in backward and in compiled code too, in whichever thread."""
    counter: collections.Counter[str] = collections.Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.pop()


def define_operator(
    name: str,
    run: Callable,
    fake: Callable,
    *,
    flops: Callable | None = None,
    schema: str | None = None,
    setup_context: Callable | None = None,
    backward: Callable = refuse_double_backward,
) -> Callable[..., Any]:
    """The custom operator ``convnext_mm::{name}``, for whatever looks at operators:
    compilers, profilers, counters of FLOPs. Where nothing looks, what it does is
    called past PyTorch's dispatcher, which takes longer than a small kernel.

    Args:
        run: What it does.
        fake: The same for tensors that have a shape and no data.
        flops: FLOPs from the shapes of the arguments.
        schema: Types of arguments and results. None: the annotations of ``run``.
        setup_context, backward: As in :class:`torch.autograd.Function`.
    """

    @functools.wraps(run)
    def counted(*args: Any) -> Any:
        for counter in _counters:
            counter[name] += 1
        return run(*args)

    operator = torch.library.custom_op(
        f'convnext_mm::{name}', counted, mutates_args=(), schema=schema
    )
    operator.register_fake(fake)
    operator.register_autograd(backward, setup_context=setup_context)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.convnext_mm, name))(flops)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            out = counted(*args)
            if setup_context is not None:
                setup_context(ctx, args, out)
            return tuple(out) if isinstance(out, list) else out

    Direct.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*args: Any) -> Any:
        if _somebody_looks(args):
            return operator(*args)
        return Direct.apply(*args) if torch.is_grad_enabled() else counted(*args)

    return call


# Types of arguments that nobody can look at: other tensors have a dispatch of
# their own.
_PLAIN = {Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, list}
_PLAIN |= {tuple, torch.Size}


def _somebody_looks(args: Sequence[Any]) -> bool:
    """Whether an operator's call must be seen as such."""
    return (
        intercepted()
        or not has('torch.autograd.profiler._is_profiler_enabled')
        or torch.autograd.profiler._is_profiler_enabled
        or not _PLAIN.issuperset(map(type, args))
        or args[0].device.type == 'meta'
    )


def intercepted() -> bool:
    """Whether a compiler, a mode or a transform takes PyTorch's calls."""
    return (
        torch.compiler.is_compiling()
        or not has('torch._C._len_torch_dispatch_stack')
        or torch._C._len_torch_dispatch_stack() > 0
        or not has('torch._C._functorch.peek_interpreter_stack')
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _backward_by(operator: Callable[..., list[Tensor]], inputs: int) -> Callable:
    """Autograd's backward, of the first ``inputs`` inputs, by an operator. Its
    arguments are the output's gradient, what ``setup_context`` saved and set as
    ``settings``, and which gradients are needed."""

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad is not None:
            needs = list(ctx.needs_input_grad[:inputs])
            found = operator(grad, *ctx.saved_tensors, *ctx.settings, needs)
            grads[:inputs] = (g if need else None for g, need in zip(found, needs))
        return tuple(grads)

    return backward


def _as_parameter(grad: Tensor, param: Tensor | None) -> Tensor:
    """In dtype, shape and strides of ``param``: compiled code relies on what the
    operator's fake announces. (Convolutions of small maps give others.) None
    stands for the layer's input, whose gradient is channels-last."""
    if param is None:
        return grad.contiguous(memory_format=torch.channels_last)
    if grad.dtype != param.dtype:
        grad = grad.to(param.dtype)
    if grad.shape != param.shape:
        grad = grad.view(param.shape)
    if grad.stride() == param.stride():
        return grad
    return torch.empty_like(param).copy_(grad)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels start on the device of ``x``."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.get_device())


@contextlib.contextmanager
def _undisturbed_on(x: Tensor) -> Iterator[None]:
    """No autocast, and kernels start on the device of ``x``."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        with on_device_of(x):
            yield
        return
    # torch.autocast does the same in ten times as long.
    torch.set_autocast_enabled(kind, False)
    try:
        with on_device_of(x):
            yield
    finally:
        torch.set_autocast_enabled(kind, True)


# The block --------------------------------------------------------------------

_WEIGHTS = ', '.join(
    f'Tensor{"?" if name in BlockWeights._field_defaults else ""} {name}'
    for name in BlockWeights._fields
)
_BLOCK = (
    f'(Tensor x, {_WEIGHTS}, Tensor? drop_scale, float eps, SymInt dilation, '
    'ScalarType dtype, SymInt keep) -> (Tensor, Tensor, Tensor, Tensor)'
)
_BLOCK_BACKWARD = (
    f'(Tensor grad_out, Tensor? x, Tensor maps, Tensor hidden, {_WEIGHTS}, '
    'Tensor? drop_scale, float eps, SymInt dilation, ScalarType x_dtype, '
    'bool[] needs) -> Tensor[]'
)


def _named(args: Sequence[Any]) -> tuple[BlockWeights, Sequence[Any]]:
    """Weights, with which the arguments ``args`` begin, and those after them."""
    count = len(BlockWeights._fields)
    return BlockWeights(*args[:count]), args[count:]


def define_block(
    name: str,
    forward: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., dict[str, Tensor]],
) -> Callable[..., Tensor]:
    """A block from its two directions, as the custom operators
    ``convnext_mm::{name}_forward`` and ``_backward``. Both run without autograd
    and autocast.

    Args:
        forward: ``(x, weights, drop_scale, eps, dilation, dtype, keep)`` to the
            output and what backward needs: the input in ``dtype``, the dtype to
            compute in (where ``x`` has another), and the depthwise output, both
            channels-last, and the pre-activation (N, H * W, M); each may be None
            where ``keep`` says so.
        backward: ``(grad_out, x, maps, hidden, weights, drop_scale, eps,
            dilation, x_dtype, needs)`` to gradients by the names of
            :class:`.BlockNeeds`, at least those needed, of weights in any
            floating dtype. ``x``, ``maps`` and ``hidden`` are what was kept; ``x``
            is None where the depthwise weight needs no gradient, ``hidden``
            empty where it is to be recomputed.

    Returns:
        A function with the signature of :func:`convnext_mm.ops.eager.block`
        and ``keep``: ``KEEP_ALL``, or ``KEEP_MAPS`` to recompute the
        pre-activation.
    """
    backward_op = define_operator(
        f'{name}_backward',
        functools.partial(_run_block_backward, backward),
        _fake_block_backward,
        flops=_block_backward_flops,
        schema=_BLOCK_BACKWARD,
    )
    forward_op = define_operator(
        f'{name}_forward',
        functools.partial(_run_block, forward),
        _fake_block,
        flops=_block_flops,
        schema=_BLOCK,
        setup_context=_setup_block_context,
        backward=_backward_by(backward_op, inputs=len(BlockNeeds._fields)),
    )

    def block(
        x: Tensor,
        weights: BlockWeights,
        drop_scale: Tensor | None = None,
        *,
        eps: float = 1e-6,
        dilation: int = 1,
        keep: int = KEEP_ALL,
    ) -> Tensor:
        if not (
            torch.is_grad_enabled()
            and any(t is not None and t.requires_grad for t in (x, *weights))
        ):
            keep = KEEP_NOTHING
        dtype = compute_dtype(x)
        return forward_op(x, *weights, drop_scale, eps, dilation, dtype, keep)[0]

    return block


def _run_block(forward: Callable, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, settings = _named(args)
    with _undisturbed_on(x):
        outputs = forward(x, weights, *settings)
    # An operator may return neither None nor one of its inputs.
    return tuple(x.new_empty(0) if t is None or t is x else t for t in outputs)


def _fake_block(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weights, (_, _, _, dtype, keep) = _named(args)
    n, _, h, w = x.shape
    out = torch.empty_like(
        x, dtype=out_dtype(x, weights.gamma, dtype), memory_format=memory_format(x)
    )
    cast = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    maps = torch.empty_like(cast)
    hidden = cast.new_empty(n, h * w, len(weights.pwconv1_weight))
    return (
        out,
        cast if keep and dtype != x.dtype else x.new_empty(0),
        maps if keep else x.new_empty(0),
        hidden if keep == KEEP_ALL else x.new_empty(0),
    )


def _setup_block_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    x, *args = inputs
    weights, (drop_scale, eps, dilation, *_) = _named(args)
    _, cast, maps, hidden = output
    ctx.mark_non_differentiable(cast, maps, hidden)
    ctx.set_materialize_grads(False)  # of the three: large zeros
    ctx.settings = eps, dilation, x.dtype
    if not cast.numel():
        cast = x
    # The input serves the depthwise weight's gradient alone.
    kept = cast if weights.dwconv_weight.requires_grad else None
    ctx.save_for_backward(kept, maps, hidden, *weights, drop_scale)


def _run_block_backward(
    backward: Callable,
    grad_out: Tensor,
    x: Tensor | None,
    maps: Tensor,
    hidden: Tensor,
    *args: Any,
) -> list[Tensor]:
    weights, (*settings, needs) = _named(args)
    kept = (x, maps, hidden)
    with _undisturbed_on(maps):
        grads = backward(grad_out, *kept, weights, *settings, BlockNeeds(*needs))
        return [
            _as_parameter(grads[name], param) if need else maps.new_empty(0)
            for name, param, need in zip(BlockNeeds._fields, (None, *weights), needs)
        ]


def _fake_block_backward(
    grad_out: Tensor, x: Tensor | None, maps: Tensor, hidden: Tensor, *args: Any
) -> list[Tensor]:
    weights, (*_, x_dtype, needs) = _named(args)
    likes = (torch.empty_like(maps, dtype=x_dtype), *weights)
    return [
        torch.empty_like(like) if need and like is not None else maps.new_empty(0)
        for like, need in zip(likes, needs)
    ]


def _block_flops(x: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of convolution and matrix products, as PyTorch counts them."""
    n, c, h, w = x
    shapes: Any = _named(args)[0]
    kernel = math.prod(shapes.dwconv_weight[2:])
    return 2 * n * h * w * c * (kernel + 2 * shapes.pwconv1_weight[0])


def _block_backward_flops(
    grad_out: Sequence[int], x: Any, maps: Any, hidden: Any, *args: Any, **kwargs: Any
) -> int:
    """Twice the forward's, and ``lean+``'s recomputed matrix product."""
    flops = 2 * _block_flops(grad_out, *args)
    if hidden[0] == 0:
        shapes: Any = _named(args)[0]
        n, c, h, w = grad_out
        flops += 2 * n * h * w * c * shapes.pwconv1_weight[0]
    return flops


# The layer between stages -----------------------------------------------------

_SETTINGS = (
    'float eps, SymInt[] stride, SymInt[] padding, SymInt[] dilation, ScalarType dtype'
)
_DOWNSAMPLE = (
    '(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor conv_weight, '
    f'Tensor conv_bias, {_SETTINGS}) -> Tensor'
)
_DOWNSAMPLE_BACKWARD = (
    '(Tensor grad, Tensor x, Tensor norm_weight, Tensor norm_bias, '
    f'Tensor conv_weight, {_SETTINGS}, bool[] needs) -> Tensor[]'
)


def define_downsample(
    name: str,
    norm: Callable[..., tuple[Tensor, ...]],
    norm_backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """LayerNorm and convolution as the custom operators
    ``convnext_mm::{name}_downsample`` and ``_downsample_backward``. They keep
    their input only, which the norm of an emitted map keeps too, and recompute
    LayerNorm.

    Args:
        norm: ``(x, weight, bias, eps, dtype)`` to the normalised (..., C)
            map, and whatever statistics ``norm_backward`` wants.
        norm_backward: ``(grad, x, weight, bias, eps, needs, *statistics)`` to
            three gradients, None where not needed.

    Returns:
        A function with the signature of
        :func:`convnext_mm.ops.eager.downsample`.
    """
    backward_op = define_operator(
        f'{name}_downsample_backward',
        functools.partial(_run_downsample_backward, norm, norm_backward),
        _fake_downsample_backward,
        flops=_downsample_backward_flops,
        schema=_DOWNSAMPLE_BACKWARD,
    )
    forward_op = define_operator(
        f'{name}_downsample',
        functools.partial(_run_downsample, norm),
        _fake_downsample,
        flops=_downsample_flops,
        schema=_DOWNSAMPLE,
        setup_context=_setup_downsample_context,
        backward=_backward_by(backward_op, inputs=5),
    )

    def downsample(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        *,
        eps: float = 1e-6,
        stride: Sequence[int] = (2, 2),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
    ) -> Tensor:
        weights = (norm_weight, norm_bias, conv_weight, conv_bias)
        dtype = compute_dtype(x)
        return forward_op(x, *weights, eps, stride, padding, dilation, dtype)

    return downsample


def _run_downsample(
    norm: Callable,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    eps: float,
    *settings: Any,
) -> Tensor:
    *geometry, dtype = settings
    with _undisturbed_on(x):
        normed = norm(x.permute(0, 2, 3, 1), norm_weight, norm_bias, eps, dtype)[0]
        x = normed.permute(0, 3, 1, 2)
        out = F.conv2d(x, conv_weight.to(dtype), conv_bias.to(dtype), *geometry)
        return out.contiguous(memory_format=torch.channels_last)


def _fake_downsample(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    eps: float,
    *settings: Any,
) -> Tensor:
    stride, padding, dilation, dtype = settings
    sizes = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(
            x.shape[2:], padding, dilation, conv_weight.shape[2:], stride
        )
    ]
    out = x.new_empty(len(x), len(conv_weight), *sizes, dtype=dtype)
    return out.contiguous(memory_format=torch.channels_last)


def _setup_downsample_context(
    ctx: Any, inputs: tuple[Any, ...], output: Tensor
) -> None:
    x, norm_weight, norm_bias, conv_weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, conv_weight)


def _run_downsample_backward(
    norm: Callable,
    norm_backward: Callable,
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    eps: float,
    *settings: Any,
) -> list[Tensor]:
    *geometry, dtype, needs = settings
    with _undisturbed_on(x):
        x_map = x.permute(0, 2, 3, 1)
        normed, *statistics = norm(x_map, norm_weight, norm_bias, eps, dtype)
        d_normed, d_weight, d_bias = torch.ops.aten.convolution_backward(
            grad,
            normed.permute(0, 3, 1, 2),
            conv_weight.to(dtype),
            [len(conv_weight)],
            *geometry,
            False,
            [0, 0],
            1,
            [any(needs[:3]), *needs[3:]],
        )
        grads: list[Any] = [None, None, None, d_weight, d_bias]
        if any(needs[:3]):
            d_map = d_normed.permute(0, 2, 3, 1)
            grads[:3] = norm_backward(
                d_map, x_map, norm_weight, norm_bias, eps, needs[:3], *statistics
            )
        if needs[0]:
            grads[0] = grads[0].permute(0, 3, 1, 2).to(x.dtype)
        conv_bias = conv_weight.new_empty(len(conv_weight))
        params = (None, norm_weight, norm_bias, conv_weight, conv_bias)
        return [
            _as_parameter(grad, param) if need else x.new_empty(0)
            for grad, param, need in zip(grads, params, needs)
        ]


def _fake_downsample_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    conv_weight: Tensor,
    *settings: Any,
) -> list[Tensor]:
    needs = settings[-1]
    grads = (
        torch.empty_like(x, memory_format=torch.channels_last),
        torch.empty_like(norm_weight),
        torch.empty_like(norm_bias),
        torch.empty_like(conv_weight),
        conv_weight.new_empty(len(conv_weight)),
    )
    return [g if need else x.new_empty(0) for g, need in zip(grads, needs)]


def _downsample_flops(*shapes: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    n, _, h, w = out_shape
    return 2 * n * h * w * math.prod(shapes[3])  # the convolution's weight


def _downsample_backward_flops(grad: Sequence[int], *shapes: Any, **kwargs: Any) -> int:
    return 2 * _downsample_flops(*shapes, out_shape=grad)
