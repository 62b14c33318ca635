"""Initial weights of a classifier's last layer."""

from torch import Tensor, nn

from convnext_mm.checkpoint import CheckpointMismatchError, read_checkpoint
from convnext_mm.checkpoint.errors import shown
from convnext_mm.checkpoint.load import overflow
from convnext_mm.checkpoint.remote import fetch
from convnext_mm.registry import WEIGHT_INITIALIZERS, register


@register(WEIGHT_INITIALIZERS)
class ReleasedClassifierInit:
    """Takes the linear layer of a head from a classifier in the layout of the
    paper's release (``head.weight``, ``head.bias``), whose backbone the
    backbone's own ``init_cfg`` loads.

    Args:
        checkpoint: Path or address, as for ``type='Pretrained'``.

    Examples:
        >>> head = dict(
        ...     type='LinearClsHead',
        ...     init_cfg=dict(
        ...         type='convnext_mm.ReleasedClassifierInit',
        ...         checkpoint='convnext_base_1k_224_ema.pth'))
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Fills ``module.fc``.

        Raises:
            CheckpointError: The file cannot be fetched or read, or has no such
                layer, or one of another size.
        """
        state = read_checkpoint(fetch(self.checkpoint))
        state = state.get('model', state)
        state = state if isinstance(state, dict) else {}
        for name, param in module.fc.named_parameters():
            value = state.get(f'head.{name}')
            is_weight = isinstance(value, Tensor) and (
                value.is_floating_point() and not value.is_meta
            )
            shape = tuple(value.shape) if is_weight else 'none'
            if shape != tuple(param.shape):
                raise CheckpointMismatchError(
                    f'{shown(self.checkpoint)}: the classifier needs '
                    f'head.{name} of {tuple(param.shape)}, found {shape}; for '
                    'other classes start it anew with init_cfg=dict('
                    "type='TruncNormal', layer='Linear', std=2e-5)"
                )
            if overflow(value, param.dtype):
                raise CheckpointMismatchError(
                    f'{shown(self.checkpoint)}: head.{name} holds '
                    f'{overflow(value, param.dtype):.3g}, more than '
                    f'{param.dtype} can'
                )
            param.data.copy_(value)
