"""Checkpoints of the networks between ResNet and ConvNeXt: how they are named, and
which step their shapes show.

The first step is a ResNet, known by torchvision's names, which timm, MMDetection
and MMPretrain use, too. All others have this package's names alone.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from convnext_mm.archs import CHOICES, NUM_STAGES, ROADMAP, Decisions

from .errors import CheckpointMismatchError, UnknownCheckpointError
from .families import FAMILIES, Family, Recognised
from .layout import STEM

# A buffer that says what weights do not show: number and kind of activations.
ACTIVATIONS = 'activations'
# Of the fields that a Family has, only the name counts here.
OWN: Family = FAMILIES[0]._replace(name='convnext_mm', origin='ModernizedResNet')
RESNET = OWN._replace(name='resnet', origin='torchvision, timm, MMDetection')
OWN_NAME = re.compile(
    r'(downsample_layers|stages)\.[0-3]\.\d+\.[\w.]+|norm[0-3]\.\w+|' + ACTIVATIONS
)
RESNET_NAMES = (
    (re.compile(r'conv1\.(\w+)'), r'downsample_layers.0.0.\1'),
    (re.compile(r'bn1\.(\w+)'), r'downsample_layers.0.1.\1'),
    (re.compile(r'layer([1-4])\.(\d+)\.conv(\d)\.(\w+)'), r'stages.{s}.\2.conv\3.\4'),
    (re.compile(r'layer([1-4])\.(\d+)\.bn(\d)\.(\w+)'), r'stages.{s}.\2.norm\3.\4'),
    (
        re.compile(r'layer([1-4])\.(\d+)\.downsample\.(\d)\.(\w+)'),
        r'stages.{s}.\2.shortcut.\3.\4',
    ),
)
RESNET_START = 'layer1.0.conv1.weight'


def activation_code(decisions: Decisions) -> Tensor:
    """Two integers that stand for number and kind of a network's activations."""
    kinds = CHOICES['activation']
    return torch.tensor(
        [decisions.num_activations, kinds.index(decisions.activation)], device='cpu'
    )


def read_activations(code: Tensor | None) -> tuple[int, str] | None:
    """Number and kind of activations; None: there is no such code.

    Raises:
        CheckpointMismatchError: It is none that :func:`activation_code` gives.
    """
    if code is None:
        return None
    kinds, numbers = CHOICES['activation'], CHOICES['num_activations']
    if (
        (code.dtype, code.layout, code.shape) == (torch.int64, torch.strided, (2,))
        and code.device.type != 'meta'
        and code.tolist() in [[n, k] for n in numbers for k in range(len(kinds))]
    ):
        number, kind = code.tolist()
        return number, kinds[kind]
    raise CheckpointMismatchError(
        f'{ACTIVATIONS!r} in it, which says what its activations are, is damaged: take '
        'an undamaged checkpoint'
    )


def recognise_steps(keys: Iterable[str]) -> list[Recognised]:
    """Every network of the roadmap among the keys, by prefix."""
    keys = list(keys)
    found = []
    for family, start in ((OWN, STEM), (RESNET, RESNET_START)):
        for key in keys:
            if not f'.{key}'.endswith(f'.{start}'):
                continue
            prefix = key[: -len(start)]
            inner = [k[len(prefix) :] for k in keys if k.startswith(prefix)]
            names = {k: ours for k in inner if (ours := _our_name(family, k))}
            found.append(Recognised(family, prefix, names))
    return sorted(found, key=lambda network: -len(network.names))


def _our_name(family: Family, name: str) -> str | None:
    if family is OWN:
        return name if OWN_NAME.fullmatch(name) else None
    for pattern, ours in RESNET_NAMES:
        match = pattern.fullmatch(name)
        if match:
            stage = int(match[1]) - 1 if '{s}' in ours else 0
            return match.expand(ours.replace('{s}', str(stage)))
    return None


def observe(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The decisions that a state dict with our names shows; None: it is too
    damaged, or of something else."""
    try:
        stem, last = state[STEM], state.get('stages.0.0.conv3.weight')
        seen: dict[str, Any] = dict(
            depths=tuple(_depth(state, s) for s in range(NUM_STAGES)),
            width=stem.shape[0],
            stem='patchify' if stem.shape[2] == 4 else 'resnet',
            separate_downsampling='downsample_layers.1.1.weight' in state,
            norm='BN' if 'downsample_layers.0.1.running_mean' in state else 'LN',
        )
        if last is None:  # ConvNeXt's block
            return dict(
                seen,
                depthwise=True,
                bottleneck='inverted',
                depthwise_position='first',
                kernel_size=state['stages.0.0.dwconv.weight'].shape[2],
                activation='GELU',
                num_activations=1,
                num_norms=1,
            )
        convs = [state[f'stages.0.0.conv{i}.weight'] for i in (1, 2)]
        is_first = convs[0].shape[2] > 1
        spatial = convs[0] if is_first else convs[1]
        seen.update(
            depthwise=spatial.shape[1] == 1,
            bottleneck='inverted' if last.shape[1] > last.shape[0] else 'narrow',
            depthwise_position='first' if is_first else 'middle',
            kernel_size=spatial.shape[2],
            num_norms=3 if 'stages.0.0.norm2.weight' in state else 1,
        )
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    return seen


def _depth(state: Mapping[str, Tensor], stage: int) -> int:
    start = f'stages.{stage}.'
    blocks = {name.split('.')[2] for name in state if name.startswith(start)}
    return len(blocks)


def steps_of(seen: Mapping[str, Any]) -> list[str]:
    """The steps that show these decisions, as a message and a config name them;
    where none does, those of another width, or else of another depth. Of networks
    without their last stages the others count."""
    by_likeness: tuple[list[str], ...] = ([], [], [])
    for regime, steps in ROADMAP.items():
        for step, decisions in steps.items():
            other = differing(seen, decisions).keys()
            if other <= {'width', 'depths'}:
                likeness = 2 if 'depths' in other else len(other)
                by_likeness[likeness].append(f'step={step!r}, regime={regime!r}')
    return next(filter(None, by_likeness), [])


def differing(seen: Mapping[str, Any], decisions: Decisions) -> dict[str, Any]:
    """What was seen where it is not what was decided. Stages that are not there say
    nothing."""
    wanted = decisions._asdict()
    built = sum(depth > 0 for depth in seen['depths'])
    wanted['depths'] = (*decisions.depths[:built], *[0] * (NUM_STAGES - built))
    if built == 1:
        wanted['separate_downsampling'] = seen['separate_downsampling']
    return {name: value for name, value in seen.items() if value != wanted[name]}


def refuse_steps(tensors: Mapping[str, Tensor]) -> None:
    """
    Raises:
        UnknownCheckpointError: The tensors hold a network of the roadmap, and not
            one with ConvNeXt's blocks.
    """
    for found in recognise_steps(tensors):
        state = {
            ours: tensors[found.prefix + name] for name, ours in found.names.items()
        }
        seen = observe(state)
        if seen is not None and 'stages.0.0.conv3.weight' in state:
            steps = steps_of(seen)
            what = f'that of {" or ".join(steps)}' if steps else f'one with {seen}'
            raise UnknownCheckpointError(
                'it holds no ConvNeXt, but a network on the road from ResNet to it, '
                f"{what}: its backbone is type='convnext_mm.ModernizedResNet'"
            )
