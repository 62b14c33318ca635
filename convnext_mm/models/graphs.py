"""CUDA graphs of a backbone: all launches of a pass by one call, for small inputs of
few sizes, where the host takes longer than the GPU."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
    network goes on without graphs, and the log says so.

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
        if not _possible(x):
            self._say_once(network, x)
            return compute(x)
        key = _state(network, x)
        graph = self._kept.get(key)
        if graph is None:
            if self._captured >= PATIENCE * self.limit:
                return compute(x)
            try:
                graph = Graph(compute, x, list(network.parameters()))
            except RuntimeError as error:
                raise RuntimeError(
                    f'the {type(network).__name__} cannot be captured as a CUDA graph '
                    f'for an input {tuple(x.shape)}: {error}. cuda_graphs=0 does '
                    'without'
                ) from error
            self._kept[key] = graph
            self._count(network)
        self._kept.move_to_end(key)
        return compute(x) if graph.waits_for_backward() else graph(x)

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


def _possible(x: Tensor) -> bool:
    return (
        _has_graphs(x)
        and not x.requires_grad
        and not torch.compiler.is_compiling()
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
        tuple((p.data_ptr(), p.requires_grad) for p in network.parameters()),
    )


class Graph:
    """A forward pass and, where gradients are asked for, its backward pass."""

    def __init__(
        self,
        compute: Callable[[Tensor], Maps],
        x: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        kind = x.device.type
        self._compute = compute
        self._input = x.clone()
        self._parameters = [
            p for p in parameters if p.requires_grad and torch.is_grad_enabled()
        ]
        self._running: weakref.ref[Any] | None = None
        # What autocast keeps of one pass must not be in the graph of another.
        with torch.autocast(
            kind,
            dtype=torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
            cache_enabled=False,
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

    def __call__(self, x: Tensor) -> Maps:
        if self._parameters:
            return _Replay.apply(self, x, *self._parameters)
        return self.forward(x)

    def forward(self, x: Tensor) -> Maps:
        self._input.copy_(x)
        self._replay_forward()
        return tuple(m.clone() for m in self._maps)

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
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
        return None, None, *ctx.graph.backward(grads)


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
        with torch.cuda.graph(graph, stream=self._stream, pool=self._pool):
            result = function()
        return result, graph.replay
