"""A runner whose checkpoints are read safely and fit their model, and whose
data is checked as it is built."""
from typing import Any, Dict

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner as MMEngineRunner
from mmengine.runner.checkpoint import (CheckpointLoader,
                                        get_external_models,
                                        get_torchvision_models)
from torch import nn
from torch.utils.data import DataLoader

from .backbone import ConvNeXt
from .checkpoint import (CheckpointDownloadError, CheckpointMismatchError,
                         read_checkpoint)
from .checkpoint.families import recognise
from .checkpoint.remote import fetch
from .data_check import check_dataset, explain_failure, leaf_configs

# MMEngine's names for addresses.
NAMED_ADDRESSES = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
}


def load_from_safe_reader(filename: str,
                          map_location: Any = None) -> Dict[str, Any]:
    """A loader for MMEngine's ``CheckpointLoader`` that executes nothing.

    Args:
        filename: A path, ``https://``, ``hf://``, ``timm://`` address, or one
            of MMEngine's ``torchvision://`` and ``open-mmlab://`` names.
        map_location: Not used: tensors come on the CPU, and models and
            optimizers take them to their own device.

    Raises:
        CheckpointError: It cannot be fetched or read, or is not safe.
    """
    scheme, _, name = filename.partition('://')
    if scheme in NAMED_ADDRESSES:
        addresses = NAMED_ADDRESSES[scheme]()
        if name not in addresses:
            raise CheckpointDownloadError(
                f'{filename}: MMEngine knows no such name')
        filename = addresses[name]
    # Not mapped: training may overwrite the file that it came from.
    return read_checkpoint(fetch(filename), mmap=False)


def use_safe_loading() -> None:
    """Makes MMEngine read every checkpoint of this process with
    :func:`load_from_safe_reader`: ``load_from``, ``resume`` and the
    ``Pretrained`` initializers of other modules."""
    schemes = {*CheckpointLoader._schemes, 'hf://', 'timm://'}
    CheckpointLoader.register_scheme(
        sorted(schemes), load_from_safe_reader, force=True)


class Runner(MMEngineRunner):
    """MMEngine's runner; a checkpoint that could run code or lacks the weights
    of a ConvNeXt backbone stops it, and so does bad data.

    MMEngine reads a pickle without protection where the protected way fails.
    Everything that it stores resumes: weights, optimizer, schedulers, message
    hub.
    """

    def __init__(self, *args, **kwargs) -> None:
        use_safe_loading()
        super().__init__(*args, **kwargs)

    def build_dataloader(self, dataloader, *args, **kwargs) -> DataLoader:
        """As MMEngine's, with the data set checked.

        Raises:
            DataError: It is bad; names the file and what to do.
        """
        try:
            loader = super().build_dataloader(dataloader, *args, **kwargs)
        except Exception:
            if isinstance(dataloader, dict):
                for dataset in leaf_configs(dataloader['dataset']):
                    explain_failure(dataset)
            raise
        check_dataset(loader.dataset, self.model)
        return loader

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        """As MMEngine's; backbones may have the names of any family.

        Raises:
            CheckpointError: It cannot be read, is not safe, or has not all
                weights of a ConvNeXt backbone.
        """
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        model = (
            self.model.module if is_model_wrapper(self.model) else self.model)
        _check_backbones(model, checkpoint, filename)
        return checkpoint


def _check_backbones(model: nn.Module, checkpoint: dict,
                     filename: str) -> None:
    """Names with no weights of a backbone are no error to MMEngine: it would
    train from noise. Incomplete ones the backbone itself refuses."""
    keys = checkpoint.get('state_dict', checkpoint)
    keys = [key for key in keys if isinstance(key, str)]
    for name, module in model.named_modules():
        if not isinstance(module, ConvNeXt) or module.allow_partial:
            continue
        prefix = f'{name}.' if name else ''
        if any(key.startswith((prefix, f'module.{prefix}')) for key in keys):
            continue
        found = recognise(keys)
        advice = (
            'its ConvNeXt lies behind '
            f'{found[0].prefix!r}: to start from a backbone, leave load_from '
            "out and set init_cfg=dict(type='Pretrained', checkpoint=...) on "
            'the backbone' if found else 'it has no ConvNeXt weights')
        raise CheckpointMismatchError(
            f'{filename}: load_from and resume take a whole '
            f'{type(model).__name__} with weights behind {prefix!r}; {advice}')
