"""From a checkpoint of any family to this package's layout."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import (
    CheckpointFileError,
    CheckpointMismatchError,
    UnknownCheckpointError,
    quoted,
    shown,
    summarise,
)
from .families import (
    FINAL_NORM_KIND,
    Family,
    Recognised,
    choose,
    label_leftover,
    norm_names,
    recognise,
)
from .layout import (
    AFFINE,
    FINAL_NORM,
    PARTS,
    Shape,
    Spec,
    expected_shapes,
    infer_spec,
    is_conv,
)
from .roadmap import refuse_steps

INSIDE = 'unknown parameters inside the backbone'
OVERLAPPING_STEM = (
    "its stem is an overlapping stem of two convolutions (timm's *_ols), the one "
    'here is one convolution over patches: take a checkpoint of a variant without '
    '_ols'
)
RMS_NORM = (
    "its norms have no biases: it is made with RMSNorm (timm's *_rms), the norms "
    'here are LayerNorm: take a checkpoint of a variant without _rms'
)
MAX_DEPTH = 32  # of dictionaries in dictionaries
MAX_NAME = 1000  # characters of a parameter's name; real ones have up to 150
# Two numbers in an element: not numbers that a parameter can take.
PACKED = (getattr(torch, 'float4_e2m1fn_x2', None),)
# Elements that tensors may declare beyond what their storages hold: what is
# done here takes time for what a file really has, whatever it declares.
MAX_EXPANDED = 2**24


@dataclass
class Report:
    """What was found in a checkpoint and what was made of it.

    Attributes:
        family: The row of the table that explains the names.
        prefix: Wrappers and prefix before the backbone's names.
        averaged: Whether this is an averaged (EMA) copy.
        spec: The network that the shapes describe.
        used: Our name to the checkpoint's, of every converted tensor.
        leftovers: Kind to keys of the checkpoint that are not the backbone's.
        not_finite: Keys that hold NaN or Inf.
        obstacles: Sentences on what no backbone of ours has.
    """

    family: Family
    prefix: str
    averaged: bool
    spec: Spec
    used: dict[str, str]
    leftovers: dict[str, list[str]]
    not_finite: list[str]
    obstacles: list[str]

    def headline(self) -> str:
        """Family, network and where it lay, in one line."""
        where = f', behind {quoted(self.prefix)}' if self.prefix else ''
        copy = ' (the averaged copy, EMA)' if self.averaged else ''
        return f'{self.spec}, family {self.family.name}{where}{copy}'


def convert(
    checkpoint: Mapping[str, Any], prefix: str | None = None
) -> tuple[dict[str, Tensor], Report]:
    """Finds the ConvNeXt in a checkpoint and gives it our names and shapes.

    Args:
        checkpoint: A state dict, or a dictionary that holds one.
        prefix: Which network, where there are several: its keys start with
            this, or with a wrapper and this.

    Returns:
        The tensors by our names (a classifier's last norm as ``FINAL_NORM`` or
        ``MAP_NORM``), and what was found. Tensors keep their dtype and, where
        only names differ, their memory. Whether they are complete is not
        checked here.

    Raises:
        UnknownCheckpointError: No ConvNeXt, or several.
        CheckpointFileError: A name cannot be printed, or is too long.
        CheckpointMismatchError: A parameter is not floating-point, has a shape
            that no ConvNeXt gives it, or declares far more than its memory.
    """
    tensors = flatten(checkpoint)
    networks = recognise(tensors)
    if not any(network.has_core for network in networks):
        refuse_steps(tensors)
    found, averaged = choose(networks, prefix)
    obstacles = []
    names = {**norm_names(found.family), **found.names}
    if _has_overlapping_stem(tensors, found):
        obstacles.append(OVERLAPPING_STEM)
        names = {
            theirs: ours
            for theirs, ours in names.items()
            if not ours.startswith('downsample_layers.0.')
        }
    used, leftovers = _sort(tensors, names, found, networks)
    if _has_classifiers_norm3(used, found, tensors):
        used = {re.sub('^norm3', FINAL_NORM, name): key for name, key in used.items()}
    state = {name: _to_layout(name, tensors[key], key) for name, key in used.items()}
    check_expanded(state.values())
    norms = [name for name in state if name.endswith(('norm.weight', 'norm.bias'))]
    if norms and not any(name.endswith('bias') for name in norms):
        obstacles.append(RMS_NORM)
    not_finite = [used[name] for name, tensor in state.items() if not is_finite(tensor)]
    return state, Report(
        found.family,
        found.prefix,
        averaged,
        infer_spec(state),
        used,
        leftovers,
        not_finite,
        obstacles,
    )


def flatten(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of dictionaries in dictionaries, keys joined with dots.

    Raises:
        UnknownCheckpointError: There are none, or they lie too deep.
        CheckpointFileError: A name cannot be printed, or is too long.
        CheckpointMismatchError: Two tensors have one name.
    """
    tensors: dict[str, Tensor] = {}
    level, depth = [('', checkpoint)], 0
    seen = set()
    while level:
        below = []
        depth += 1
        for prefix, container in level:
            if id(container) in seen:
                continue
            seen.add(id(container))
            for key, value in container.items():
                if not isinstance(key, str):
                    continue  # optimizer state
                # Cut first: many names may share one long string.
                name = (prefix + key[:MAX_NAME])[:MAX_NAME]
                if isinstance(value, Mapping):
                    below.append((f'{name}.', value))
                elif isinstance(value, Tensor) and not is_lazy(value):
                    if depth > MAX_DEPTH:
                        raise UnknownCheckpointError(
                            'its tensors lie deeper than in '
                            f'{MAX_DEPTH} dictionaries: pass the inner one'
                        )
                    _check_name(name)
                    if name in tensors:
                        raise CheckpointMismatchError(f'{shown(name)} is in it twice')
                    tensors[name] = value
        level = below
    if not tensors:
        raise UnknownCheckpointError('it holds no tensors')
    return tensors


def _check_name(name: str) -> None:
    if len(name) >= MAX_NAME:
        raise CheckpointFileError(
            f'the name of a parameter has {MAX_NAME} characters or more: {shown(name)}'
        )
    if not name.isprintable():
        raise CheckpointFileError(
            'the name of a parameter has characters that cannot be printed: '
            f'{shown(name)}'
        )


def _has_overlapping_stem(tensors: Mapping[str, Tensor], found: Recognised) -> bool:
    """Whether a convolution follows the stem's first, in the place of the norm
    or one after it (behind an activation)."""
    first = found.prefix + found.family.stem[0]
    return first.endswith('0') and any(
        tensors[key].dim() == 4
        for key in (f'{first[:-1]}{i}.weight' for i in (1, 2))
        if key in tensors
    )


def _sort(
    keys: Iterable[str],
    names: Mapping[str, str],
    found: Recognised,
    networks: Iterable[Recognised],
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Our name to the key that becomes it; and kinds of the other keys."""
    copies = {
        network.prefix + name
        for network in networks
        if network is not found
        for name in network.names
    }
    roots = {name.split('.', 1)[0] for name in found.names}
    used: dict[str, str] = {}
    leftovers: dict[str, list[str]] = {}
    for key in keys:
        inner = key[len(found.prefix) :] if key.startswith(found.prefix) else ''
        if inner in names:
            used[names[inner]] = key
        elif key in copies:
            leftovers.setdefault('another copy of the network', []).append(key)
        else:
            leftovers.setdefault(_label(key, inner, roots), []).append(key)
    return used, leftovers


def _label(key: str, inner: str, roots: Collection[str]) -> str:
    """What a key is that has no place in the backbone."""
    is_inside = inner.split('.', 1)[0] in roots and 'decoder.' not in inner
    return INSIDE if is_inside else label_leftover(key)


def check_expanded(tensors: Iterable[Tensor]) -> None:
    """Checks that tensors do not declare far more than their memory holds.

    Raises:
        CheckpointMismatchError: They do.
    """
    declared: dict[int, int] = Counter()  # elements, by storage
    held: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        declared[storage.data_ptr()] += tensor.numel()
        held[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
    if sum(max(0, declared[at] - held[at]) for at in held) > MAX_EXPANDED:
        raise CheckpointMismatchError(
            f'its tensors are expanded from fewer values than they declare, '
            f'{sum(declared.values())} from {sum(held.values())}: save them '
            'again after .contiguous()'
        )


def check_weight(tensor: Tensor, key: str) -> None:
    """Checks that a tensor is one of numbers that a parameter can take.

    Raises:
        CheckpointMismatchError: It is not floating-point, not dense or without
            data.
    """
    if not tensor.is_floating_point() or tensor.dtype in PACKED:
        raise CheckpointMismatchError(
            f'{shown(key)} has dtype {tensor.dtype}; weights are '
            'floating-point (quantised models cannot be loaded)'
        )
    layout = 'nested' if tensor.is_nested else tensor.layout
    if layout != torch.strided or tensor.device.type == 'meta':
        raise CheckpointMismatchError(
            f'{shown(key)} is a {layout} tensor on {tensor.device}; weights '
            'are dense tensors with data'
        )


def _to_layout(name: str, tensor: Tensor, key: str) -> Tensor:
    """The tensor with the number of dimensions that our parameter has."""
    check_weight(tensor, key)
    shape = tuple(tensor.shape)
    if key.endswith('.kernel'):
        result = _from_sparse_kernel(name, tensor)
    elif name.endswith(('.grn.gamma', '.grn.beta')):
        result = tensor.reshape(1, 1, 1, -1) if _is_vector(shape) else None
    elif name.endswith(('pwconv1.weight', 'pwconv2.weight')):
        is_matrix = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
        result = tensor.flatten(1) if is_matrix else None
    elif is_conv(name):
        result = tensor if len(shape) == 4 else None
    else:
        result = tensor.reshape(-1) if _is_vector(shape) else None
    if result is None or result.numel() == 0:
        raise CheckpointMismatchError(
            f'{shown(key)} has shape {shape}, which no {name} of a ConvNeXt has'
        )
    return result


def _is_vector(shape: Shape) -> bool:
    return sum(n != 1 for n in shape) <= 1 and len(shape) > 0


def _from_sparse_kernel(name: str, tensor: Tensor) -> Tensor | None:
    """Kernels of sparse convolutions, positions first and column by column:
    (k * k, C) depthwise, (k * k, C_in, C_out) otherwise."""
    size = math.isqrt(tensor.shape[0]) if tensor.dim() else 0
    rank = 2 if name.endswith('dwconv.weight') else 3
    if size == 0 or size * size != tensor.shape[0] or tensor.dim() != rank:
        return None
    grid = tensor.reshape(size, size, *tensor.shape[1:])  # (x, y, ...)
    if rank == 2:
        return grid.permute(2, 1, 0).unsqueeze(1)
    return grid.permute(3, 2, 1, 0)


def _has_classifiers_norm3(
    names: Iterable[str], found: Recognised, keys: Iterable[str]
) -> bool:
    """mmpretrain's classifiers call their last norm norm3, as its detectors
    call an output norm: alone and with a classifier's head, or with nothing
    else at all, it is the classifier's."""
    norms = {name.split('.')[0] for name in names if name.startswith('norm')}
    return (
        found.family.name == 'mmpretrain'
        and norms == {'norm3'}
        and all(key.startswith(found.prefix) or '.head.' in f'.{key}' for key in keys)
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor Inf."""
    # NaN and Inf survive a sum, which needs no memory; a sum may overflow.
    if math.isfinite(tensor.detach().sum(dtype=torch.float32)):
        return True
    if tensor.element_size() == 1:  # isfinite does not know every fp8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def complete(state: Mapping[str, Tensor], report: Report) -> dict[str, Tensor]:
    """Checks that a converted state dict is a whole network.

    Returns:
        It without a classifier's last norm, which becomes a leftover in the
        report.

    Raises:
        CheckpointMismatchError: Parameters are missing, contradict each other
            or are not those of a ConvNeXt.
    """
    expected = expected_shapes(report.spec)
    for s, width in enumerate(report.spec.channels):
        norm = {f'norm{s}.{leaf}': (width,) for leaf in AFFINE}
        if norm.keys() & state.keys():
            expected.update(norm)
    missing = [name for name in expected if name not in state]
    wrong = [
        f'{report.used[name]} {tuple(state[name].shape)}, not {shape}'
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    extra = [
        name for name in state if name not in expected and name.split('.')[0] in PARTS
    ] + report.leftovers.get(INSIDE, [])
    reasons = list(report.obstacles)
    if not report.spec.depths or 0 in report.spec.depths:
        reasons.append('a stage has no blocks')
    for what, keys in (
        ('missing', missing),
        ('of another shape', wrong),
        ('with no place in a ConvNeXt', extra),
    ):
        if keys:
            reasons.append(f'{len(keys)} parameters {what}: {summarise(keys)}')
    if reasons:
        raise CheckpointMismatchError(
            f'{report.headline()}, is incomplete or inconsistent: ' + '; '.join(reasons)
        )
    final = [name for name in state if name.startswith(FINAL_NORM)]
    if final:
        report.leftovers.setdefault(FINAL_NORM_KIND, []).extend(
            report.used.pop(name) for name in final
        )
    return {name: tensor for name, tensor in state.items() if name not in final}
