"""Fitting a checkpoint to a network between ResNet and ConvNeXt."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmengine.logging import print_log
from torch import Tensor

from convnext_mm.archs import Decisions

from .convert import check_weight, flatten, is_finite
from .errors import CheckpointMismatchError, quoted, summarise
from .families import choose, label_leftover, recognise
from .roadmap import ACTIVATIONS, RESNET, differing, observe, recognise_steps, steps_of

State = dict[str, Tensor]


class Backbone(Protocol):
    """What fitting asks of a :class:`convnext_mm.ModernizedResNet`."""

    allow_partial: bool

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class StepReport:
    """What was found in a checkpoint, as :class:`.convert.Report` has it."""

    family: str
    prefix: str
    used: dict[str, str]
    leftovers: dict[str, list[str]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    seen: dict[str, Any] | None = None

    def headline(self) -> str:
        """Family, step and where it lay, in one line."""
        steps = steps_of(self.seen) if self.seen else []
        where = f', behind {quoted(self.prefix)}' if self.prefix else ''
        return f'{" or ".join(steps) or "no known step"}, family {self.family}{where}'


def fit_step(
    backbone: Backbone,
    decisions: Decisions,
    tensors: Mapping[str, Any],
    prefix: str | None,
) -> tuple[State, StepReport]:
    """What of a checkpoint goes into which parameter and buffer of a backbone.

    Args:
        backbone: A :class:`convnext_mm.ModernizedResNet` without ConvNeXt's blocks.
        decisions: Its.
        tensors: A state dict, or a dictionary that holds one.
        prefix: Which network, where there are several.

    Returns:
        Tensors by the names of the backbone's state dict, and what was found.

    Raises:
        UnknownCheckpointError: There is no such network, or there are several.
        CheckpointMismatchError: It is that of another step (says which), is not
            complete, or has other shapes, and the backbone has not
            ``allow_partial``.
    """
    flat = flatten(tensors)
    found = recognise_steps(flat)
    if not found and recognise(flat):
        raise CheckpointMismatchError(
            "it holds a ConvNeXt, which is step='separate downsampling'; the "
            f'backbone is {_describe(decisions)}'
        )
    network, _ = choose(found, prefix)
    report = StepReport(
        network.family.name,
        network.prefix,
        {ours: network.prefix + name for name, ours in network.names.items()},
    )
    for key in flat:
        inner = key[len(network.prefix) :] if key.startswith(network.prefix) else key
        if key.startswith(network.prefix) and inner in network.names:
            continue
        report.leftovers.setdefault(label_leftover(key), []).append(key)
    state = {ours: flat[key] for ours, key in report.used.items()}
    report.seen = observe(state)
    if network.family is RESNET and report.seen is not None:
        report.seen.update(activation='ReLU', num_activations=3)
    ours = backbone.state_dict()
    for name, tensor in state.items():
        if not _is_counter(name):
            check_weight(tensor, report.used[name])
    report.not_finite = [
        report.used[name]
        for name, tensor in state.items()
        if tensor.is_floating_point() and not is_finite(tensor)
    ]
    unfit = _compare(backbone, decisions, ours, state, report)
    fitted = {n: t for n, t in state.items() if n in ours and n not in unfit}
    # Counters say nothing about the network.
    fitted.update(
        {
            name: own
            for name, own in ours.items()
            if _is_counter(name) and not _is_alike(fitted.get(name), own)
        }
    )
    return fitted, report


def _is_counter(name: str) -> bool:
    return name == ACTIVATIONS or name.endswith('num_batches_tracked')


def _is_alike(tensor: Tensor | None, own: Tensor) -> bool:
    return (
        tensor is not None
        and (tensor.shape, tensor.dtype, tensor.layout)
        == (own.shape, own.dtype, own.layout)
        and tensor.device.type != 'meta'
    )


def _compare(
    backbone: Backbone,
    decisions: Decisions,
    ours: Mapping[str, Tensor],
    state: State,
    report: StepReport,
) -> set[str]:
    """Names that do not fit, where that is allowed."""
    needed = {name for name in ours if not _is_counter(name)}
    given_norms = {name.split('.')[0] for name in state if name.startswith('norm')}
    needed -= {
        n for n in needed if n.startswith('norm') and n.split('.')[0] not in given_norms
    }
    missing = sorted(needed - state.keys())
    built = {name.split('.')[1] for name in ours if name.startswith('stages.')}
    extra = [
        name
        for name in state
        if name not in ours
        and not name.startswith('norm')
        and not _is_counter(name)
        and name.split('.')[1] in built
    ]
    wrong = {
        name
        for name, own in ours.items()
        if name in needed and name in state and state[name].shape != own.shape
    }
    other = differing(report.seen, decisions) if report.seen else {}
    # Not built here, so not asked for.
    if other.get('depths', ())[: len(built)] == decisions.depths[: len(built)]:
        del other['depths']
    for name in state:
        if name not in ours and name.split('.')[0] in ('stages', 'downsample_layers'):
            kind = 'stages that the model does not build'
            report.leftovers.setdefault(kind, []).append(report.used[name])
    if not (missing or extra or wrong or other):
        return set()
    lines = [
        f'its weights are those of {report.headline()}; the backbone is '
        f'{_describe(decisions)}'
    ]
    if other:
        steps = steps_of(report.seen or {})
        settings = ', '.join(f'{name}={value!r}' for name, value in other.items())
        lines.append(
            f'- for these weights set {steps[0] if steps else settings}'
            f' (they differ in: {settings})'
        )
    for what, names in (
        ('missing in the checkpoint', missing),
        ('not in the backbone', extra),
        ('of another shape', sorted(wrong)),
    ):
        if names:
            lines.append(f'- {len(names)} parameters {what}: {summarise(names)}')
    message = '\n'.join(lines)
    if not backbone.allow_partial:
        raise CheckpointMismatchError(
            f'{message}\nNothing was loaded. To load what fits and leave the rest as '
            'it is: allow_partial=True on the backbone'
        )
    if len(wrong) + len(missing) >= len(needed):
        raise CheckpointMismatchError(
            f'{message}\nNothing fits, not even with allow_partial'
        )
    print_log(
        f'allow_partial: {message}\nThe rest is loaded',
        logger='current',
        level=logging.WARNING,
    )
    return wrong


def _describe(decisions: Decisions) -> str:
    return ' or '.join(steps_of(decisions._asdict())) or str(decisions)
