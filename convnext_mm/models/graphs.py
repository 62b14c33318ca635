"""CUDA graphs of a backbone: all launches of a pass by one call, for small inputs of
few sizes, where the host takes longer than the GPU."""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from convnext_mm.ops.define import intercepted, on_device_of

Maps = tuple[Tensor, ...]
WARM_UP = 3  # passes before a capture: kernels are chosen, compiled and loaded
PATIENCE = 4  # captures for each graph that is kept, before it is given up


class Graphs:
    """Those of one network, by shape and state of their input.

    A graph is captured when a shape is first met. It computes in memory of its own,
    which stays taken; its maps and gradients are copied out. What a graph cannot do
    runs without one: inputs that are not on an NVIDIA GPU, a gradient for the images,
    a second forward pass before the first one's backward (it would overwrite what that
    needs), compiled code. Where parameters move or sizes change all the time, the
    network goes on without graphs, and the log says so. A replay runs no hooks of
    modules inside, and one network's passes must follow each other on one stream.

    Args:
        limit: Graphs that are kept; the one longest unused goes first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[tuple[Any, ...], Graph] = OrderedDict()
        self._captured = 0
        self._said = False

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Graphs':
        return Graphs(self.limit)  # a copied network has parameters of its own

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.limit,)

    def run(
        self, network: nn.Module, compute: Callable[[Tensor], Maps], x: Tensor
    ) -> Maps:
        """``compute(x)``, which uses the parameters of ``network``."""
        if not _possible(network, x):
            self._say_once(network, x)
            return compute(x)
        key = _state(network, x)
        graph = self._kept.get(key)
        if graph is None:
            if self._captured >= PATIENCE * self.limit:
                return compute(x)
            try:
                with on_device_of(x):
                    graph = Graph(network, compute, x)
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f'the {type(network).__name__} cannot be captured as a CUDA graph '
                    f'for an input {tuple(x.shape)}: {error}. cuda_graphs=0 does '
                    'without'
                ) from error
            self._kept[key] = graph
            self._count(network)
        self._kept.move_to_end(key)
        if graph.waits_for_backward():
            return compute(x)
        return graph(x, [p for p in network.parameters() if p.requires_grad])

    def _say_once(self, network: nn.Module, x: Tensor) -> None:
        if self._said or torch.compiler.is_compiling() or _has_graphs(x):
            return
        self._said = True
        print_log(
            f'cuda_graphs={self.limit} of the {type(network).__name__} does nothing on '
            f'{x.device.type}: CUDA graphs are for NVIDIA GPUs',
            'current',
            30,
        )

    def _count(self, network: nn.Module) -> None:
        if len(self._kept) > self.limit:
            self._kept.popitem(last=False)
        self._captured += 1
        if self._captured == PATIENCE * self.limit:
            print_log(
                f'{self._captured} CUDA graphs were captured, and inputs still change '
                f'their size or parameters their place: the {type(network).__name__} '
                'goes on without new ones. cuda_graphs is for inputs of few sizes',
                'current',
                30,
            )


def _has_graphs(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def _possible(network: nn.Module, x: Tensor) -> bool:
    return (
        _has_graphs(x)
        and not x.requires_grad
        and not intercepted()
        and not getattr(network, '_is_replica', False)  # of nn.DataParallel
        # Sharded ones are gathered anew for each pass.
        and all(type(p) is nn.Parameter for p in network.parameters())
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.cuda.is_current_stream_capturing()
    )


def _state(network: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """All that a graph has fixed: input, modes, and where parameters lie."""
    kind = x.device.type
    return (
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        tuple(m.training for m in network.modules()),
        tuple(
            # Deployed blocks pack their weights again when those change.
            (p.data_ptr(), p.requires_grad, network.deployed and _version(p))
            for p in network.parameters()
        ),
    )


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


class Graph:
    """A forward pass and, where gradients are asked for, its backward pass.

    Both are captured with aliases of the parameters: the same memory, without the
    hooks that a gradient of the parameters themselves runs later, and without what
    accumulates it, which waits for the stream of an earlier pass.
    """

    def __init__(
        self, network: nn.Module, compute: Callable[[Tensor], Maps], x: Tensor
    ) -> None:
        kind = x.device.type
        self._compute = compute
        self._input = x.clone()
        training = torch.is_grad_enabled()
        aliases = {
            p: p.detach().requires_grad_(training and p.requires_grad)
            for p in network.parameters()
        }
        self._parameters = [p for p in aliases.values() if p.requires_grad]
        self._places = [
            (module._parameters, name, aliases[p])
            for module in network.modules()
            for name, p in module._parameters.items()
            if p is not None
        ]
        self._running: weakref.ref[Any] | None = None
        # What autocast keeps of one pass must not be in the graph of another, and
        # hooks of a checkpoint around this must not see what is captured.
        with (
            torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            ),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ):
            capture = Capture()
            capture.aside(self._warm_up, WARM_UP)
            self._maps, self._replay_forward = capture.of(self._forward)
            self._differentiable = [m.requires_grad for m in self._maps]
            if self._parameters:
                self._cotangents = [torch.zeros_like(m) for m in self._maps]
                self._grads, self._replay_backward = capture.of(self._backward)
        self._maps = tuple(m.detach() for m in self._maps)

    def _warm_up(self) -> None:
        self._maps = self._forward()
        if self._parameters:
            self._cotangents = [torch.zeros_like(m) for m in self._maps]
            self._backward()

    def _forward(self) -> Maps:
        with _replaced(self._places):
            return self._compute(self._input)

    def _backward(self) -> tuple[Tensor | None, ...]:
        pairs = [
            (m, c) for m, c in zip(self._maps, self._cotangents) if m.requires_grad
        ]
        return torch.autograd.grad(
            [m for m, _ in pairs],
            self._parameters,
            [c for _, c in pairs],
            allow_unused=True,
        )

    def waits_for_backward(self) -> bool:
        """Whether what was kept for a backward pass is still needed."""
        return self._running is not None and self._running() is not None

    def __call__(self, x: Tensor, parameters: Sequence[nn.Parameter]) -> Maps:
        """``parameters``: those with gradients, now."""
        if self._parameters:
            return _Replay.apply(self, x, *parameters)
        return self.forward(x)

    def forward(self, x: Tensor) -> Maps:
        self._input.copy_(x)
        self._replay_forward()
        return tuple(m.clone() for m in self._maps)

    def backward(self, context: Any, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """
        Raises:
            RuntimeError: What this pass kept is used up, or another's.
        """
        if self._running is None or self._running() is not context:
            raise RuntimeError(
                'a second backward pass through the same forward pass finds nothing '
                'in a CUDA graph; cuda_graphs=0 of the backbone allows it'
            )
        for cotangent, grad in zip(self._cotangents, grads):
            cotangent.copy_(grad)
        self._replay_backward()
        self._running = None
        # Copied, as optimizers and accumulated gradients keep what they are given.
        return [None if g is None else g.clone() for g in self._grads]

    def keep_for(self, context: Any, maps: Maps) -> None:
        """What is kept is needed until the context of autograd is gone."""
        self._running = weakref.ref(context)
        context.mark_non_differentiable(
            *(m for m, needed in zip(maps, self._differentiable) if not needed)
        )


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, x: Tensor, *parameters: Tensor) -> Maps:
        ctx.graph = graph
        maps = graph.forward(x)
        graph.keep_for(ctx, maps)
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.backward(ctx, grads)


@contextlib.contextmanager
def _replaced(places: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Modules with other tensors as their parameters."""
    before = [parameters[name] for parameters, name, _ in places]
    try:
        for parameters, name, other in places:
            parameters[name] = other
        yield
    finally:
        for (parameters, name, _), parameter in zip(places, before):
            parameters[name] = parameter


class Capture:
    """Captures functions into CUDA graphs that share their memory, to be replayed in
    the order of their capture."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self, function: Callable[[], Any], times: int) -> None:
        """Runs it on the stream of the captures."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                function()
        torch.cuda.synchronize()

    def of(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What it returned, and what computes that anew, in the same place."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on, such as one that pins the next images' memory.
        with torch.cuda.graph(
            graph,
            stream=self._stream,
            pool=self._pool,
            capture_error_mode='thread_local',
        ):
            result = function()
        return result, graph.replay
