"""Fitting a checkpoint to a network between ResNet and ConvNeXt."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mmengine.logging import print_log
from torch import Tensor

from convnext_mm.archs import Decisions

from .convert import INSIDE, check_expanded, check_weight, flatten, is_finite
from .errors import CheckpointMismatchError, quoted, summarise
from .families import Recognised, choose, label_leftover, recognise
from .fit import adapt_stem, advise_dtype, too_large
from .layout import STEM
from .roadmap import (
    ACTIVATIONS,
    RESNET,
    activation_code,
    differing,
    observe,
    read_activations,
    recognise_steps,
    steps_of,
)

State = dict[str, Tensor]
PARTS = ('stages.', 'downsample_layers.', 'layer')  # ours, and a ResNet's


class Backbone(Protocol):
    """What fitting asks of a :class:`convnext_mm.ModernizedResNet`."""

    allow_partial: bool

    def state_dict(self) -> dict[str, Any]: ...


@dataclass
class StepReport:
    """What was found in a checkpoint, as :class:`.convert.Report` has it."""

    family: str
    prefix: str
    averaged: bool
    used: dict[str, str]
    leftovers: dict[str, list[str]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    seen: dict[str, Any] | None = None

    def headline(self) -> str:
        """Family, step and where it lay, in one line."""
        steps = steps_of(self.seen) if self.seen else []
        where = f', behind {quoted(self.prefix)}' if self.prefix else ''
        copy = ' (the averaged copy, EMA)' if self.averaged else ''
        step = ' or '.join(steps[:2]) or 'no known step'
        return f'{step}, family {self.family}{where}{copy}'


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
            complete, has other shapes, or values that the backbone cannot hold, and
            the backbone has not ``allow_partial``; or it is damaged.
    """
    flat = flatten(tensors)
    networks = recognise_steps(flat)
    if not networks and recognise(flat):
        raise CheckpointMismatchError(
            "it holds a ConvNeXt, which is step='separate downsampling'; the "
            f'backbone is {_describe(decisions)}'
        )
    found, averaged = choose(networks, prefix)
    report = StepReport(
        found.family.name,
        found.prefix,
        averaged,
        {ours: found.prefix + name for name, ours in found.names.items()},
    )
    report.leftovers = _leftovers(flat, found, networks)
    state = {ours: flat[key] for ours, key in report.used.items()}
    activations = read_activations(state.pop(ACTIVATIONS, None))
    counts = {n: state.pop(n) for n in list(state) if _is_count(n)}
    for name, tensor in state.items():
        check_weight(tensor, report.used[name])
    check_expanded(state.values())
    report.seen = observe(state)
    if report.seen is not None:
        if found.family is RESNET:
            activations = (3, 'ReLU')
        if activations is not None and 'num_activations' not in report.seen:
            number, kind = activations
            report.seen.update(num_activations=number, activation=kind)
    own = backbone.state_dict()
    params = {n: t for n, t in own.items() if n != ACTIVATIONS and not _is_count(n)}
    adapt_stem(state, params)
    unfit = _compare(backbone, decisions, params, state, report)
    fitted = {n: t for n, t in state.items() if n in params and n not in unfit}
    report.not_finite = [
        report.used[name] for name, tensor in fitted.items() if not is_finite(tensor)
    ]
    fitted[ACTIVATIONS] = activation_code(decisions)
    for name in filter(_is_count, own):
        count = counts.get(name)
        is_whole = count is not None and _is_plain(count, own[name])
        fitted[name] = counts[name] if is_whole else own[name].new_zeros(())
    return fitted, report


def _leftovers(
    flat: State, found: Recognised, networks: list[Recognised]
) -> dict[str, list[str]]:
    """Kinds to keys that are not the network's."""
    copies = {n.prefix + name for n in networks if n is not found for name in n.names}
    leftovers: dict[str, list[str]] = {}
    for key in flat:
        inner = key[len(found.prefix) :] if key.startswith(found.prefix) else ''
        if inner in found.names:
            continue
        if key in copies:
            kind = 'another copy of the network'
        elif inner.startswith(PARTS):
            kind = INSIDE
        else:
            kind = label_leftover(key)
        leftovers.setdefault(kind, []).append(key)
    return leftovers


def _is_count(name: str) -> bool:
    return name.endswith('num_batches_tracked')


def _is_plain(tensor: Tensor, own: Tensor) -> bool:
    return (
        (tensor.shape, tensor.dtype, tensor.layout)
        == (own.shape, own.dtype, own.layout)
        and tensor.device.type != 'meta'
        and not tensor.is_nested
    )


def _compare(
    backbone: Backbone,
    decisions: Decisions,
    params: State,
    state: State,
    report: StepReport,
) -> set[str]:
    """Names that do not fit, where that is allowed."""
    given_norms = {name.split('.')[0] for name in state if name.startswith('norm')}
    needed = {
        name
        for name in params
        if not name.startswith('norm') or name.split('.')[0] in given_norms
    }
    missing = sorted(needed - state.keys())
    built = {name.split('.')[1] for name in params if name.startswith('stages.')}
    extra = report.leftovers.get(INSIDE, []) + [
        name
        for name in state
        if name not in params
        and not name.startswith('norm')
        and name.split('.')[1] in built
    ]
    wrong = {
        name
        for name in needed & state.keys()
        if state[name].shape != params[name].shape
    }
    fitting = {n: t for n, t in state.items() if n in params and n not in wrong}
    excess = too_large(fitting, params)
    other = differing(report.seen, decisions) if report.seen else {}
    # Not built here, so not asked for.
    if other.get('depths', ())[: len(built)] == decisions.depths[: len(built)]:
        del other['depths']
    is_silent = report.seen is not None and 'num_activations' not in report.seen
    for name in state:
        if name not in params and not name.startswith('norm') and name not in extra:
            kind = 'stages that the model does not build'
            report.leftovers.setdefault(kind, []).append(report.used[name])
    if not (missing or extra or wrong or other or excess or is_silent):
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
    if is_silent:
        lines.append(
            f'- {ACTIVATIONS!r} is missing in the checkpoint, the only thing that '
            'tells it from another step with the same names and shapes'
        )
    if report.family == RESNET.name and STEM not in state:
        lines.append(
            '- it is a ResNet whose stem is not one convolution (ResNet-C, -D and '
            'their like), which no step has'
        )
    if excess:
        lines.append(f'- {advise_dtype(excess, params)}')
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
    unfit = {*wrong, *excess}
    if len(unfit) + len(missing) >= len(needed):
        raise CheckpointMismatchError(
            f'{message}\nNothing fits, not even with allow_partial'
        )
    print_log(
        f'allow_partial: {message}\nThe rest is loaded',
        logger='current',
        level=logging.WARNING,
    )
    return unfit


def _describe(decisions: Decisions) -> str:
    return ' or '.join(steps_of(decisions._asdict())[:2]) or 'one of other decisions'
