"""Initial weights of a classifier's last layer."""

from torch import nn

from convnext_mm.checkpoint import CheckpointMismatchError
from convnext_mm.checkpoint.errors import naming
from convnext_mm.checkpoint.fit import fill
from convnext_mm.checkpoint.load import read_beside
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
            CheckpointError: The file cannot be fetched or read, or has no
                backbone, or beside it no such layer, or one of another size.
        """
        tensors = read_beside(self.checkpoint)
        params = dict(module.get_submodule('fc').named_parameters())
        with naming(self.checkpoint):
            for name, param in params.items():
                tensor = tensors.get(f'head.{name}')
                found = 'none' if tensor is None else tuple(tensor.shape)
                if found != tuple(param.shape):
                    raise CheckpointMismatchError(
                        f'the classifier needs head.{name} of '
                        f'{tuple(param.shape)}, found {found}; for other classes '
                        "start it anew with init_cfg=dict(type='TruncNormal', "
                        "layer='Linear', std=2e-5)"
                    )
            heads = {f'head.{name}': param for name, param in params.items()}
            fill(heads, {name: tensors[name] for name in heads})
