"""Fitting a converted checkpoint to a backbone."""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .convert import INSIDE, Report, check_weight
from .errors import CheckpointMismatchError, summarise
from .families import FINAL_NORM_KIND, OUT_NORMS_KIND
from .layout import AFFINE, FINAL_NORM, MAP_NORM, PARTS, STEM, Spec, infer_spec

State = dict[str, Tensor]
Params = Mapping[str, Tensor]  # and, where they are filled, buffers


class Backbone(Protocol):
    """What fitting asks of a :class:`convnext_mm.ConvNeXt`.

    Attributes:
        allow_partial: Take what fits.
        gap_before_final_norm: Its last norm is of pooled features.
        num_stages: Of the network; its last norm is that of the last stage.
    """

    allow_partial: bool
    gap_before_final_norm: bool
    num_stages: int

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def fit(backbone: Backbone, state: Mapping[str, Tensor], report: Report) -> State:
    """What of a converted state dict goes into which parameter of a backbone.

    Args:
        backbone: A :class:`convnext_mm.ConvNeXt`.
        state: Of :func:`.convert.convert`.
        report: Of the same; gets what is left out.

    Returns:
        Tensors with the names and shapes of the backbone's parameters.

    Raises:
        CheckpointMismatchError: A parameter of stem, downsampling layers or
            stages, or half an output norm, is missing, superfluous, of another
            shape or too large for the backbone's dtype; or its last norm works
            otherwise; and the backbone has not ``allow_partial``.
    """
    params = dict(backbone.named_parameters())
    placed = dict(state)
    _place_last_norm(placed, params, report, backbone)
    adapt_stem(placed, params)
    faults = _compare(placed, params, report)
    if faults.exist:
        _refuse_or_warn(faults, params, report, backbone.allow_partial)
    unfit = {*faults.wrong, *faults.too_large}
    fitted = {
        name: tensor
        for name, tensor in placed.items()
        if name in params and name not in unfit
    }
    _note_unused(placed, params, report)
    _log_norms(params, fitted)
    return fitted


def fill(params: Params, state: Mapping[str, Tensor]) -> None:
    """Copies tensors into parameters of their names and shapes.

    Raises:
        CheckpointMismatchError: The parameters have no memory, or a tensor no
            numbers that they can hold. None is changed then.
    """
    if any(param.is_meta for param in params.values()):
        raise CheckpointMismatchError(
            'the model lies on the meta device, without memory for weights: '
            "call to_empty(device='cpu') first"
        )
    for name, tensor in state.items():
        check_weight(tensor, name)
    if excess := too_large(state, params):
        raise CheckpointMismatchError(advise_dtype(excess, params))
    with torch.no_grad():
        for name, tensor in state.items():
            params[name].copy_(tensor)


def _place_last_norm(
    state: State, params: Params, report: Report, backbone: Backbone
) -> None:
    """Makes a classifier's last norm the output norm of the last stage, where
    both do the same and the checkpoint has no such output norm."""
    gap, ours = backbone.gap_before_final_norm, f'norm{backbone.num_stages - 1}'
    if f'{ours}.weight' not in params or any(
        f'{ours}.{leaf}' in state for leaf in AFFINE
    ):
        return
    of_map = any(f'{MAP_NORM}.{leaf}' in state for leaf in AFFINE)
    if of_map and gap:
        report.obstacles.append(
            "the checkpoint's network normalises its last map and then pools "
            "(timm's head_norm_first, norm_pre), the backbone does it the "
            'other way round: emit maps, gap_before_final_norm=False'
        )
        return
    if not of_map and not gap:
        return
    theirs = MAP_NORM if of_map else FINAL_NORM
    for leaf in AFFINE:
        if f'{theirs}.{leaf}' in state:
            state[f'{ours}.{leaf}'] = state.pop(f'{theirs}.{leaf}')
    if of_map:
        print_log(
            f'norm_pre, which normalises the last map, becomes {ours}', logger='current'
        )


def adapt_stem(state: State, params: Params) -> None:
    """Makes the stem of an RGB network take another number of channels.

    Fewer channels get the average over red, green and blue; more repeat them in
    turn. Both are scaled by 3 / in_channels, so that an image whose channels
    are all alike gives (for a multiple of 3, and for fewer than 3 channels,
    exactly) what it gave before.
    """
    if STEM not in state:
        return
    weight, wanted = state[STEM], params[STEM].shape[1]
    if weight.shape[1] != 3 or wanted == 3:
        return
    weight = weight.double()
    if wanted < 3:
        weight = weight.mean(1, keepdim=True).repeat(1, wanted, 1, 1)
    else:
        weight = weight[:, torch.arange(wanted) % 3]
    weight = weight * (3 / wanted)
    # What the parameter cannot hold is a fault, found later with its value.
    held = weight.to(params[STEM].dtype)
    state[STEM] = held if bool(held.isfinite().all()) else weight
    print_log(
        f'The checkpoint takes 3 channels, the backbone {wanted}: the '
        f'stem is {"averaged" if wanted < 3 else "repeated"} over channels '
        f'and scaled by 3 / {wanted}',
        logger='current',
    )


@dataclass
class Faults:
    """Why a checkpoint does not fit a backbone.

    Attributes:
        missing: Parameters that the checkpoint lacks.
        wrong: Shape in the checkpoint of parameters that have another.
        too_large: Largest magnitude in the checkpoint for parameters that
            cannot hold it.
        extra: What the checkpoint has and the backbone not.
        obstacles: Sentences on what else is different.
    """

    missing: list[str]
    wrong: dict[str, tuple[int, ...]]
    too_large: dict[str, float]
    extra: list[str]
    obstacles: list[str]

    @property
    def exist(self) -> bool:
        return any(vars(self).values())


def _compare(state: State, params: Params, report: Report) -> Faults:
    needed = {*PARTS, *(name.split('.')[0] for name in state)}
    wrong = {
        name: tuple(state[name].shape)
        for name, param in params.items()
        if name in state and state[name].shape != param.shape
    }
    built = {stage for name in params if (stage := _stage(name))}
    return Faults(
        missing=sorted(
            name
            for name in params
            if name not in state and name.split('.')[0] in needed
        ),
        wrong=wrong,
        too_large=too_large(
            {name: tensor for name, tensor in state.items() if name not in wrong},
            params,
        ),
        extra=report.leftovers.get(INSIDE, [])
        + [name for name in state if name not in params and _stage(name) in built],
        obstacles=list(report.obstacles),
    )


def _stage(name: str) -> str:
    """Number of the stage that a parameter belongs to; of norms, nothing."""
    part, number = name.split('.')[:2]
    return number if part in PARTS else ''


def too_large(state: Mapping[str, Tensor], params: Params) -> dict[str, float]:
    """The largest finite magnitude of tensors that hold more than the dtype of
    their parameter can."""
    return {
        name: value
        for name, param in params.items()
        if name in state and (value := _overflow(state[name], param.dtype))
    }


def _overflow(tensor: Tensor, dtype: torch.dtype) -> float:
    """The largest finite magnitude in a tensor if ``dtype`` cannot hold it,
    else 0."""
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return 0.0
    if tensor.element_size() == 1:  # much is not implemented for fp8
        tensor = tensor.float()
    largest = tensor.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()
    return 0.0 if math.isfinite(largest.to(dtype)) else float(largest)


def _refuse_or_warn(
    faults: Faults, params: Params, report: Report, allow_partial: bool
) -> None:
    message = _diagnose(faults, params, report)
    if not allow_partial:
        raise CheckpointMismatchError(
            f'{message}\nNothing was loaded. To load what fits and leave '
            'the rest as it is: allow_partial=True on the backbone'
        )
    unfit = {*faults.missing, *faults.wrong, *faults.too_large}
    if len(unfit) >= len(params):
        raise CheckpointMismatchError(
            f'{message}\nNothing fits, not even with allow_partial'
        )
    print_log(
        f'allow_partial: {message}\nThe rest is loaded',
        logger='current',
        level=logging.WARNING,
    )


def _diagnose(faults: Faults, params: Params, report: Report) -> str:
    """What differs between a checkpoint and a backbone, in a few lines."""
    ours = infer_spec(params)
    hints = list(faults.obstacles)
    if faults.too_large:
        hints.append(advise_dtype(faults.too_large, params))
    hints += _hints(report.spec, ours)
    lines = [f'{report.headline()}, does not fit the backbone ({ours}):']
    lines += [f'- {hint}' for hint in hints]
    for what, names in (
        ('missing in the checkpoint', faults.missing),
        ('not in the backbone', faults.extra),
    ):
        if names:
            lines.append(f'- {len(names)} parameters {what}: {_group(names)}')
    if faults.wrong:
        examples = ', '.join(
            f'{name} {shape}, in the backbone {tuple(params[name].shape)}'
            for name, shape in list(faults.wrong.items())[:2]
        )
        lines.append(
            f'- {len(faults.wrong)} parameters of another shape, such as {examples}'
        )
    return '\n'.join(lines)


def advise_dtype(too_large: Mapping[str, float], params: Params) -> str:
    name, value = next(iter(too_large.items()))
    return (
        f'{len(too_large)} parameters would hold more than their dtype can, such '
        f'as {name}, {value:.3g} in {params[name].dtype}: take an undamaged '
        'checkpoint, or a wider dtype'
    )


def _hints(theirs: Spec, ours: Spec) -> list[str]:
    """What to set in the config."""
    if theirs.isotropic != ours.isotropic:
        kind = 'IsotropicConvNeXt' if theirs.isotropic else 'ConvNeXt'
        return [
            f"the checkpoint is {theirs}: set type='convnext_mm.{kind}' and "
            f'arch={theirs.arch!r}'
        ]
    n = min(len(theirs.depths), len(ours.depths))
    hints = []
    if n < len(ours.depths):
        hints.append(
            f'the checkpoint has only the first {n} stages: emit no '
            'later ones (out_indices), or take another checkpoint'
        )
    if (theirs.depths[:n], theirs.channels[:n]) != (ours.depths[:n], ours.channels[:n]):
        is_name = '(' not in theirs.arch and ' or ' not in theirs.arch
        hints.append(
            f'the checkpoint is {theirs.arch}, the config says {ours.arch}: set '
            f'arch={repr(theirs.arch) if is_name else theirs.arch}'
        )
    if theirs.use_grn != ours.use_grn:
        hints.append(
            'these are ConvNeXt V2 weights, the backbone is V1: set use_grn=True'
            if theirs.use_grn
            else 'these are ConvNeXt V1 weights, the backbone is V2: set use_grn=False'
        )
    elif theirs.layer_scale != ours.layer_scale:
        hints.append(
            'the checkpoint has layer scale, the backbone not: set '
            'layer_scale_init_value=1e-6'
            if theirs.layer_scale
            else 'the checkpoint has no layer scale: set layer_scale_init_value=0'
        )
    for setting, reason in (
        ('in_channels', 'its first layer has {} channels'),
        ('stem_patch_size', 'its stem_patch_size is {}'),
        ('kernel_size', 'its kernel_size is {}'),
    ):
        value, own = getattr(theirs, setting), getattr(ours, setting)
        if value != own:
            hints.append(
                f'{reason.format(value)}, the backbone {own}: set {setting}={value}'
            )
    ratios = _mlp_ratios(theirs)
    if len(ratios) == 1 and ratios != _mlp_ratios(ours):
        hints.append(f'its mlp_ratio is {ratios.pop():g}: set mlp_ratio')
    return hints


def _mlp_ratios(spec: Spec) -> set[float]:
    return {hidden / c for hidden, c in zip(spec.hidden, spec.channels) if c}


def _group(names: list[str]) -> str:
    """Parameter names; those of several blocks of a stage counted instead of
    listed."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split('.')
        if parts[0] == 'stages' and len(parts) > 3:
            parts[2] = '*'
        groups.setdefault('.'.join(parts), []).append(name)
    listed = [
        group[0] if len(group) == 1 else f'{pattern} ({len(group)} blocks)'
        for pattern, group in groups.items()
    ]
    return summarise(listed, limit=6)


def _note_unused(state: State, params: Params, report: Report) -> None:
    for name in state:
        if name in params:
            continue
        if name.startswith(FINAL_NORM):
            kind = FINAL_NORM_KIND
        elif name.startswith('norm'):
            kind = OUT_NORMS_KIND
        else:
            kind = 'stages that the model does not build'
        report.leftovers.setdefault(kind, []).append(report.used[name])


def _log_norms(params: Params, fitted: State) -> None:
    kept = sorted(
        {
            name.split('.')[0]
            for name in params
            if name.startswith('norm') and name not in fitted
        }
    )
    if kept:
        print_log(
            f'Output norms that the checkpoint lacks keep their initial '
            f'values: {", ".join(kept)}',
            logger='current',
        )
