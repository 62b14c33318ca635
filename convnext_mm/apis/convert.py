"""Converting a checkpoint of any family into one of this package."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convnext_mm.checkpoint import CheckpointFileError
from convnext_mm.checkpoint.convert import Report
from convnext_mm.checkpoint.errors import CheckpointWriteError, shown
from convnext_mm.checkpoint.load import Source, read_network

SUFFIXES = ('.pth', '.pt', '.safetensors')


def convert_file(
    source: Source, target: Path, prefix: str | None = None, trust_pickle: bool = False
) -> Report:
    """Reads, checks, converts and writes a checkpoint.

    Args:
        source, prefix, trust_pickle: Of :func:`convnext_mm.load_checkpoint`.
        target: File to write, .pth, .pt or .safetensors; ``source`` may be the
            same.

    Returns:
        What was found, used and left out.

    Raises:
        CheckpointError: The source is not a complete ConvNeXt, or the target
            cannot be written.
    """
    if target.suffix not in SUFFIXES:
        raise CheckpointFileError(
            f'DST must end in {" or ".join(SUFFIXES)}, got {shown(target)}'
        )
    if not target.parent.is_dir():
        raise CheckpointFileError(
            f'the folder {shown(target.parent)} does not exist; make it first'
        )
    state, report = read_network(source, prefix, trust_pickle)
    state = own_memory(state)
    # Written beside and then renamed: the source may be the same file.
    partial = target.with_name(f'{target.name}.{os.getpid()}.tmp')
    try:
        if target.suffix == '.safetensors':
            save_file(state, partial, metadata=dict(format='pt'))
        else:
            torch.save(
                dict(
                    state_dict=state,
                    meta=dict(family=report.family.name, arch=report.spec.arch),
                ),
                partial,
            )
        os.replace(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointWriteError(
            f'{shown(target)} cannot be written ({shown(error)}); is the disk full?'
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return report


def own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor without what else lies in its memory: other parameters where
    all are views of one buffer, the same one where two names share it."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() > tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result
