"""Initial weights of a classifier's last layer."""
from torch import nn

from .checkpoint import read_checkpoint
from .checkpoint.remote import fetch
from .registry import WEIGHT_INITIALIZERS, register


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
            CheckpointError: The file cannot be fetched or read.
            ValueError: It has no such layer, or one of another size.
        """
        state = read_checkpoint(fetch(self.checkpoint))
        state = state.get('model', state)
        state = state if isinstance(state, dict) else {}
        for name, param in module.fc.named_parameters():
            value = state.get(f'head.{name}')
            shape = tuple(getattr(value, 'shape', ())) or 'none'
            if shape != tuple(param.shape):
                raise ValueError(
                    f'{self.checkpoint}: the classifier needs head.{name} of '
                    f'{tuple(param.shape)}, found {shape}; for other classes '
                    "start it anew with init_cfg=dict(type='TruncNormal', "
                    "layer='Linear', std=2e-5)")
            param.data.copy_(value)
