"""From a checkpoint of any family to this package's layout."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from convnext_mm.archs import ARCHS

from .errors import (
    CheckpointFileError,
    CheckpointMismatchError,
    UnknownCheckpointError,
    shown,
)
from .families import (
    FINAL_NORM,
    NUM_STAGES,
    Family,
    Recognised,
    choose,
    label_leftover,
    norm_names,
    quoted,
    recognise,
)

Shape = tuple[int, ...]
MAX_DEPTH = 32  # of dictionaries in dictionaries
MAX_NAME = 1000  # characters of a parameter's name; real ones have up to 150
# Two numbers in an element: not numbers that a parameter can take.
PACKED = (getattr(torch, 'float4_e2m1fn_x2', None),)
# Elements that tensors may declare beyond what their storages hold: what is
# done here takes time for what a file really has, whatever it declares.
MAX_EXPANDED = 2**24


class Spec(NamedTuple):
    """What the shapes of a state dict say about its network."""

    depths: Shape
    channels: Shape
    in_channels: int
    stem_patch_size: int
    kernel_size: int
    hidden: Shape  # channels between the pointwise layers
    use_grn: bool
    layer_scale: bool

    @property
    def arch(self) -> str:
        """The published names that fit, or depths and channels."""
        n = len(self.depths)
        names = [
            name
            for name, arch in ARCHS.items()
            if (arch.depths[:n], arch.channels[:n]) == (self.depths, self.channels)
        ]
        return ' or '.join(names) or (
            f'dict(depths={list(self.depths)}, channels={list(self.channels)})'
        )

    def __str__(self) -> str:
        stages = (
            ''
            if len(self.depths) == NUM_STAGES
            else f', first {len(self.depths)} stages'
        )
        return f'ConvNeXt {"V2" if self.use_grn else "V1"} {self.arch}{stages}'


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
    spec: Spec | None = None
    used: dict[str, str] = field(default_factory=dict)
    leftovers: dict[str, list[str]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)

    def headline(self) -> str:
        """Family, network and where it lay, in one line."""
        where = f', behind {quoted(self.prefix)}' if self.prefix else ''
        copy = ' (the averaged copy, EMA)' if self.averaged else ''
        return f'{self.spec}, family {self.family.name}{where}{copy}'

    def leftover_line(self) -> str:
        """What is left out and why, in one line."""
        return '; '.join(
            f'{label}: {summarise(keys)}' for label, keys in self.leftovers.items()
        )


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
    tensors = _flatten(checkpoint)
    networks = recognise(tensors)
    found, averaged = choose(networks, prefix)
    copies = {
        network.prefix + name
        for network in networks
        if network is not found
        for name in network.names
    }
    report = Report(found.family, found.prefix, averaged)
    names = {**norm_names(found.family), **found.names}
    if _has_overlapping_stem(tensors, found):
        report.obstacles.append(
            "its stem is an overlapping stem of two convolutions (timm's "
            '*_ols), the one here is one convolution over patches: take a '
            'checkpoint of a variant without _ols'
        )
        names = {
            theirs: ours
            for theirs, ours in names.items()
            if not ours.startswith('downsample_layers.0.')
        }
    roots = {name.split('.', 1)[0] for name in found.names}
    state = {}
    for key, tensor in tensors.items():
        inner = key[len(found.prefix) :] if key.startswith(found.prefix) else None
        name = names.get(inner)
        if name is None:
            label = (
                'another copy of the network'
                if key in copies
                else _label(key, inner, roots)
            )
            report.leftovers.setdefault(label, []).append(key)
            continue
        state[name] = _to_layout(name, inner, tensor, key)
        report.used[name] = key
    _check_expanded(state.values())
    _set_apart_final_norm(state, report, tensors)
    norms = {name for name in state if name.endswith('norm.weight')}
    if norms and not any(name.endswith('norm.bias') for name in state):
        report.obstacles.append(
            "its norms have no biases: it is made with RMSNorm (timm's *_rms), "
            'the norms here are LayerNorm: take a checkpoint of a variant '
            'without _rms'
        )
    report.not_finite = [
        report.used[name] for name, tensor in state.items() if not _is_finite(tensor)
    ]
    report.spec = infer_spec(state)
    return state, report


def _flatten(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of dictionaries in dictionaries, keys joined with dots."""
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


def _check_expanded(tensors: Iterable[Tensor]) -> None:
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


INSIDE = 'unknown parameters inside the backbone'


def _label(key: str, inner: str | None, roots: Collection[str]) -> str:
    """What a key is that has no place in the backbone."""
    is_inside = (
        inner is not None
        and inner.split('.', 1)[0] in roots
        and 'decoder.' not in inner
    )
    return INSIDE if is_inside else label_leftover(key)


def _to_layout(name: str, inner: str, tensor: Tensor, key: str) -> Tensor:
    """The tensor with the number of dimensions that our parameter has."""
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
    shape = tuple(tensor.shape)
    if inner.endswith('.kernel'):
        result = _from_sparse_kernel(name, tensor)
    elif name.endswith(('.grn.gamma', '.grn.beta')):
        result = tensor.reshape(1, 1, 1, -1) if _is_vector(shape) else None
    elif name.endswith(('pwconv1.weight', 'pwconv2.weight')):
        is_matrix = len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1))
        result = tensor.flatten(1) if is_matrix else None
    elif _is_conv(name):
        result = tensor if len(shape) == 4 else None
    else:
        result = tensor.reshape(-1) if _is_vector(shape) else None
    if result is None or result.numel() == 0:
        raise CheckpointMismatchError(
            f'{shown(key)} has shape {shape}, which no {name} of a ConvNeXt has'
        )
    return result


def _is_conv(name: str) -> bool:
    """Whether a parameter of ours is a convolution's weight."""
    return (
        name.endswith('dwconv.weight')
        or re.fullmatch(r'downsample_layers\.(0\.0|[1-3]\.1)\.weight', name) is not None
    )


def _is_vector(shape: Shape) -> bool:
    return sum(n != 1 for n in shape) <= 1 and len(shape) > 0


def _from_sparse_kernel(name: str, tensor: Tensor) -> Tensor | None:
    """Kernels of sparse convolutions, positions first and column by column:
    (k * k, C) depthwise, (k * k, C_in, C_out) otherwise."""
    size = math.isqrt(tensor.shape[0]) if tensor.dim() else 0
    rank = 2 if name.endswith('dwconv.weight') else 3
    if size == 0 or size * size != tensor.shape[0] or tensor.dim() != rank:
        return None
    grid = tensor.unflatten(0, (size, size))  # (x, y, ...)
    if rank == 2:
        return grid.permute(2, 1, 0).unsqueeze(1)
    return grid.permute(3, 2, 1, 0)


def _set_apart_final_norm(
    state: dict[str, Tensor], report: Report, tensors: Iterable[str]
) -> None:
    """mmpretrain's classifiers call their last norm norm3, as its detectors
    call an output norm: alone and with a classifier's head, or with nothing
    else at all, it is the classifier's."""
    norms = {name.split('.')[0] for name in state if name.startswith('norm')}
    is_classifier = all(
        key.startswith(report.prefix) or '.head.' in f'.{key}' for key in tensors
    )
    if report.family.name == 'mmpretrain' and norms == {'norm3'} and is_classifier:
        for leaf in ('weight', 'bias'):
            if f'norm3.{leaf}' in state:
                state[f'{FINAL_NORM}.{leaf}'] = state.pop(f'norm3.{leaf}')
                report.used[f'{FINAL_NORM}.{leaf}'] = report.used.pop(f'norm3.{leaf}')


def _is_finite(tensor: Tensor) -> bool:
    # NaN and Inf survive a sum, which needs no memory; a sum may overflow.
    if math.isfinite(tensor.detach().sum(dtype=torch.float32)):
        return True
    if tensor.element_size() == 1:  # isfinite does not know every fp8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def _most_common(values: Iterable[int], default: int) -> int:
    counts = Counter(values).most_common(1)
    return counts[0][0] if counts else default


def infer_spec(state: Mapping[str, Tensor]) -> Spec:
    """The network that a state dict in our layout belongs to. Where parameters
    contradict each other the majority counts."""
    depths, channels, hidden = [], [], []
    for s in range(NUM_STAGES):
        start = f'stages.{s}.'
        block = {
            name[len(start) :]: tensor
            for name, tensor in state.items()
            if name.startswith(start)
        }
        layer = [
            tensor.shape[0]
            for name, tensor in state.items()
            if name
            in (
                f'downsample_layers.{s}.{0 if s == 0 else 1}.weight',
                f'downsample_layers.{s}.{0 if s == 0 else 1}.bias',
            )
        ]
        if not block and not layer:
            break
        depths.append(max((int(name.split('.')[0]) + 1 for name in block), default=0))
        channels.append(
            _most_common(
                [
                    tensor.shape[0]
                    for name, tensor in block.items()
                    if name.split('.', 1)[1]
                    in ('norm.weight', 'norm.bias', 'dwconv.bias', 'pwconv2.bias')
                ]
                + layer,
                0,
            )
        )
        hidden.append(
            _most_common(
                (
                    tensor.shape[0]
                    for name, tensor in block.items()
                    if name.endswith('.pwconv1.bias')
                ),
                4 * channels[-1],
            )
        )
    stem = state.get('downsample_layers.0.0.weight')
    return Spec(
        tuple(depths),
        tuple(channels),
        stem.shape[1] if stem is not None else 3,
        stem.shape[2] if stem is not None else 4,
        _most_common(
            (
                tensor.shape[2]
                for name, tensor in state.items()
                if name.endswith('.dwconv.weight')
            ),
            7,
        ),
        tuple(hidden),
        any('.grn.' in name for name in state),
        any(name.endswith('.gamma') and '.grn.' not in name for name in state),
    )


def expected_shapes(spec: Spec) -> dict[str, Shape]:
    """Shapes of stem, downsampling layers and stages of a network."""
    shapes: dict[str, Shape] = {}
    before = spec.in_channels
    for s, (depth, width, hidden) in enumerate(
        zip(spec.depths, spec.channels, spec.hidden)
    ):
        size = 2 if s else spec.stem_patch_size
        conv, norm = (1, 0) if s else (0, 1)
        layers = {
            f'downsample_layers.{s}.{conv}': (width, before, size, size),
            f'downsample_layers.{s}.{norm}': (before if s else width,),
        }
        for b in range(depth):
            block = f'stages.{s}.{b}'
            layers[f'{block}.dwconv'] = (width, 1, spec.kernel_size, spec.kernel_size)
            layers[f'{block}.norm'] = (width,)
            layers[f'{block}.pwconv1'] = (hidden, width)
            layers[f'{block}.pwconv2'] = (width, hidden)
            if spec.use_grn:
                shapes[f'{block}.grn.gamma'] = (1, 1, 1, hidden)
                shapes[f'{block}.grn.beta'] = (1, 1, 1, hidden)
            elif spec.layer_scale:
                shapes[f'{block}.gamma'] = (width,)
        for name, shape in layers.items():
            shapes[f'{name}.weight'] = shape
            shapes[f'{name}.bias'] = shape[:1]
        before = width
    return shapes


def check_complete(state: Mapping[str, Tensor], report: Report) -> None:
    """Checks that a converted state dict is a whole network.

    Raises:
        CheckpointMismatchError: Parameters are missing, contradict each other
            or are not those of a ConvNeXt.
    """
    expected = expected_shapes(report.spec)
    for s, width in enumerate(report.spec.channels):
        norm = {f'norm{s}.weight': (width,), f'norm{s}.bias': (width,)}
        if norm.keys() & state.keys():
            expected.update(norm)
    missing = [name for name in expected if name not in state]
    wrong = [
        f'{report.used[name]} {tuple(state[name].shape)}, not {shape}'
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    extra = [
        name
        for name in state
        if name not in expected and name.startswith(('stages.', 'downsample_layers.'))
    ] + report.leftovers.get(INSIDE, [])
    reasons = list(report.obstacles)
    if len(report.spec.depths) == 0 or 0 in report.spec.depths:
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


def summarise(keys: list[str], limit: int = 3) -> str:
    """A few of many keys."""
    text = ', '.join(shown(key, 100) for key in keys[:limit])
    return text if len(keys) <= limit else f'{text}, ... ({len(keys)} in all)'
