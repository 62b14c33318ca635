"""One ConvNeXt block: its parameters, and the place that picks what runs it."""
from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .ops import eager

IMPLEMENTATIONS: Dict[str, Callable[..., Tensor]] = {'eager': eager.block}
IMPL_NAMES = ('auto', *IMPLEMENTATIONS)


def select_impl(impl: str, x: Tensor) -> Callable[..., Tensor]:
    """The block function for a requested ``impl`` and an input.

    ``'auto'`` is the best that the device, dtype and shape of ``x`` allow; it
    never fails.
    """
    return IMPLEMENTATIONS['eager' if impl == 'auto' else impl]


class GRN(nn.Module):
    """Parameters of global response normalisation, shaped (1, 1, 1, C) as in
    ConvNeXt V2's release. The arithmetic is :func:`convnext_mm.ops.eager.grn`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))


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

    def __init__(self,
                 channels: int,
                 kernel_size: int = 7,
                 mlp_ratio: float = 4,
                 norm_eps: float = 1e-6,
                 use_grn: bool = False,
                 drop_path: float = 0.,
                 layer_scale_init_value: float = 1e-6,
                 with_cp: bool = False,
                 dilation: int = 1,
                 impl: str = 'auto') -> None:
        super().__init__()
        hidden = int(mlp_ratio * channels)
        self.dwconv = nn.Conv2d(
            channels,
            channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=channels)
        self.norm = nn.LayerNorm(channels, eps=norm_eps)
        self.pwconv1 = nn.Linear(channels, hidden)
        self.grn = GRN(hidden) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, channels)
        self.gamma = None
        if not use_grn and layer_scale_init_value > 0:
            self.gamma = nn.Parameter(
                torch.full((channels, ), float(layer_scale_init_value)))
        self.drop_path = drop_path
        self.with_cp = with_cp
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        # Sampled here, before an implementation is picked and outside of
        # checkpointing: one seed gives the same decisions whatever runs.
        drop_scale = self._sample_drop_scale(x)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(
                self._run,
                x,
                drop_scale,
                use_reentrant=False,
                preserve_rng_state=False)
        return self._run(x, drop_scale)

    def _run(self, x: Tensor, drop_scale: Optional[Tensor]) -> Tensor:
        return select_impl(self.impl, x)(
            x,
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.pwconv2.weight,
            self.pwconv2.bias,
            self.gamma,
            self.grn.gamma if self.grn is not None else None,
            self.grn.beta if self.grn is not None else None,
            drop_scale,
            eps=self.norm.eps,
            dilation=self.dwconv.dilation[0])

    def _sample_drop_scale(self, x: Tensor) -> Optional[Tensor]:
        """(N,) fp32 scales of stochastic depth (arXiv 1603.09382), or None."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return (torch.rand(len(x), device=x.device) < keep) / keep

    def extra_repr(self) -> str:
        return (f'drop_path={self.drop_path:.3g}, with_cp={self.with_cp}, '
                f'impl={self.impl!r}')
