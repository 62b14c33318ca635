"""One ConvNeXt block: its parameters, and the place that picks what runs it."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convnext_mm.ops import deploy, eager, lean, triton
from convnext_mm.ops.measure import lean_is_as_fast
from convnext_mm.ops.weights import BlockWeights
from convnext_mm.private_names import has


class Implementation(NamedTuple):
    """Functions with the signatures of those of :mod:`convnext_mm.ops.eager`."""

    block: Callable[..., Tensor]
    downsample: Callable[..., Tensor]
    norm: Callable[..., Tensor] = eager.norm


IMPLEMENTATIONS: dict[str, Implementation] = {
    'eager': Implementation(eager.block, eager.downsample),
    'lean': Implementation(lean.block, lean.downsample),
    'lean+': Implementation(lean.block_plus, lean.downsample),
    'triton': Implementation(triton.block, triton.downsample, triton.norm),
}
IMPL_NAMES = ('auto', *IMPLEMENTATIONS)
IMPL_VARIABLE = 'CONVNEXT_MM_IMPL'  # overrides every impl, for debugging
# Older PyTorch cannot tell that it exports.
torch_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)


def select_impl(impl: str, x: Tensor) -> Implementation:
    """The functions for a requested ``impl`` and an input.

    ``'auto'`` is the best that the device, dtype and shape of ``x`` allow; it
    never fails. The environment variable ``CONVNEXT_MM_IMPL`` overrides
    ``impl``. An exporter sees ``'eager'``, whatever is asked for: a file holds
    PyTorch's operators. What runs is logged when it is first picked.

    Raises:
        ValueError: ``CONVNEXT_MM_IMPL`` or ``impl`` is no known name.
        RuntimeError: ``'triton'`` is asked for where it cannot run.
    """
    source, override = 'impl', _override()
    if override:
        source, impl = IMPL_VARIABLE, override
    if impl not in IMPL_NAMES:
        raise ValueError(f'unknown {source} {impl!r}; one of {IMPL_NAMES}')
    name = _best(x) if impl == 'auto' else impl
    if _is_exporting() or (name in ('lean', 'lean+') and not lean.available()):
        name = 'eager'
    if name == 'triton':
        reason = triton.why_not(x)
        if reason is not None:
            raise RuntimeError(
                f"{source}='triton' cannot run here: {reason}. "
                "impl='auto' takes the best that can"
            )
    if not torch.compiler.is_compiling():
        _log_choice(source, impl, name, x.device.type)
    return IMPLEMENTATIONS[name]


@torch.compiler.assume_constant_result
def _override() -> str | None:
    return os.environ.get(IMPL_VARIABLE)


def _best(x: Tensor) -> str:
    if _needs_plain_operators():
        return 'eager'
    if x.device.type == 'cpu':
        return 'lean'
    if x.device.type != 'cuda':
        return 'eager'
    device = str(x.device)
    if triton.why_not(x) is None and triton.works_on(device):
        return 'triton'
    if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        return 'eager'  # nothing can be timed
    return 'lean' if lean_is_as_fast(device) else 'eager'


def _is_exporting() -> bool:
    """Whether TorchScript, ``torch.export`` or ONNX is being written, or something
    counts FLOPs by tracing."""
    # To Dynamo of PyTorch 2.11 every compilation is an export.
    return not torch.compiler.is_dynamo_compiling() and (
        torch_is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def _needs_plain_operators() -> bool:
    """Whether something looks at the network that knows PyTorch's operators
    only: exporters, forward-mode differentiation, torch.func."""
    if torch.compiler.is_compiling():
        return torch_is_exporting()
    return (
        _is_exporting()
        # PyTorch has no public names for these. What cannot tell may be watched.
        or not has('torch.autograd.forward_ad._current_level')
        or torch.autograd.forward_ad._current_level >= 0
        or not has('torch._C._functorch.peek_interpreter_stack')
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


@functools.cache  # once for each choice
def _log_choice(source: str, impl: str, name: str, device: str) -> None:
    print_log(f'ConvNeXt blocks on {device}: {name!r} ({source}={impl!r})', 'current')


class GRN(nn.Module):
    """Parameters of global response normalisation, shaped (1, 1, 1, C) as in
    ConvNeXt V2's release. The arithmetic is :func:`convnext_mm.ops.eager.grn`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))


def sample_drop_scale(x: Tensor, drop_path: float) -> Tensor | None:
    """(N,) fp32 scales of stochastic depth (arXiv 1603.09382) for (N, ...), or
    None where no sample may skip."""
    if drop_path == 0:
        return None
    keep = 1 - drop_path
    return (torch.rand(len(x), device=x.device) < keep) / keep


class Block(nn.Module):
    """ConvNeXt block, V1 or (with ``use_grn``) V2; keeps shape and strides.

    The submodules hold parameters under the published names; the arithmetic is
    a function of :mod:`convnext_mm.ops`, so hooks on them are not called.

    Args:
        channels: C of the (N, C, H, W) input and output.
        kernel_size: Of the depthwise convolution, odd.
        mlp_ratio: Hidden channels of the pointwise layers over C.
        norm_eps: LayerNorm's eps.
        use_grn: V2: GRN after GELU, no layer scale.
        drop_path: Probability that a sample skips the block in training.
        layer_scale_init_value: Initial gamma; 0 or less: no layer scale.
        with_cp: Recompute the block in backward instead of storing it.
        dilation: Of the depthwise convolution, padded to keep the size.
        impl: ``'auto'`` or one implementation's name.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        mlp_ratio: float = 4,
        norm_eps: float = 1e-6,
        use_grn: bool = False,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        with_cp: bool = False,
        dilation: int = 1,
        impl: str = 'auto',
    ) -> None:
        super().__init__()
        hidden = int(mlp_ratio * channels)
        self.dwconv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels,
        )
        self.norm = nn.LayerNorm(channels, eps=norm_eps)
        self.pwconv1 = nn.Linear(channels, hidden)
        self.grn = GRN(hidden) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, channels)
        self.gamma = None
        if not use_grn and layer_scale_init_value > 0:
            self.gamma = nn.Parameter(
                torch.full((channels,), float(layer_scale_init_value))
            )
        self.drop_path = drop_path
        self.with_cp = with_cp
        self.impl = impl
        self.deployed = False
        self._run_deployed = deploy.DeployedBlock()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        # Sampled here, before an implementation is picked and outside of
        # checkpointing: one seed gives the same decisions whatever runs.
        drop_scale = sample_drop_scale(x, self.drop_path if self.training else 0)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._run, x, drop_scale, use_reentrant=False, preserve_rng_state=False
            )
        return self._run(x, drop_scale)

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Folds what :mod:`convnext_mm.ops.deploy` says into the pointwise
        layers; the folded parameters stay, as 1 and 0. For inference."""
        weights = self._weights()
        for parameter, value in zip(weights, deploy.fold(weights)):
            if parameter is not None and value is not None:
                parameter.copy_(value)
        self.deployed = True
        self._run_deployed = deploy.DeployedBlock()

    def _weights(self) -> BlockWeights:
        # Each once: a module looks its attributes up slowly.
        dwconv, norm, grn = self.dwconv, self.norm, self.grn
        pwconv1, pwconv2 = self.pwconv1, self.pwconv2
        dwconv_bias = dwconv.bias
        assert dwconv_bias is not None
        return BlockWeights(
            dwconv_weight=dwconv.weight,
            dwconv_bias=dwconv_bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            pwconv1_weight=pwconv1.weight,
            pwconv1_bias=pwconv1.bias,
            pwconv2_weight=pwconv2.weight,
            pwconv2_bias=pwconv2.bias,
            gamma=self.gamma,
            grn_gamma=None if grn is None else grn.gamma,
            grn_beta=None if grn is None else grn.beta,
        )

    def _run(self, x: Tensor, drop_scale: Tensor | None) -> Tensor:
        run = select_impl(self.impl, x).block
        if (
            self.deployed
            and run in (lean.block, lean.block_plus)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            run = self._run_deployed
        return run(
            x,
            self._weights(),
            drop_scale,
            eps=self.norm.eps,
            dilation=self.dwconv.dilation[0],
        )

    def extra_repr(self) -> str:
        return (
            f'drop_path={self.drop_path:.3g}, with_cp={self.with_cp}, '
            f'impl={self.impl!r}'
        )


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W).

    Args:
        channels: C.
        eps: Added to the variance.
        impl: ``'auto'`` or one implementation's name.
        channels_last: Strides of the output; else contiguous.
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        impl: str = 'auto',
        channels_last: bool = True,
    ) -> None:
        super().__init__(channels, eps=eps)
        self.impl = impl
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return select_impl(self.impl, x).norm(
            x, self.weight, self.bias, eps=self.eps, channels_last=self.channels_last
        )


class Downsample(nn.Sequential):
    """The layer before a stage but the first: LayerNorm, then a convolution.

    Like :class:`Block` it holds parameters under the published names, and
    calls no hooks on its submodules.

    Args:
        norm: LayerNorm over the channels of (N, C, H, W).
        conv: The convolution.
        impl: ``'auto'`` or one implementation's name.
    """

    def __init__(self, norm: nn.LayerNorm, conv: nn.Conv2d, impl: str = 'auto') -> None:
        super().__init__(norm, conv)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, D, H / 2, W / 2) at the usual stride."""
        norm, conv = self
        if type(conv) is not nn.Conv2d:  # it does more than convolve
            return conv(norm(x))
        return select_impl(self.impl, x).downsample(
            x,
            norm.weight,
            norm.bias,
            conv.weight,
            conv.bias,
            eps=norm.eps,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
