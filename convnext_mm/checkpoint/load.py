"""Public loading functions, and fitting a checkpoint to a backbone."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .convert import (
    INSIDE,
    Report,
    Spec,
    check_complete,
    convert,
    infer_spec,
    summarise,
)
from .errors import CheckpointError, CheckpointMismatchError, shown
from .families import FINAL_NORM, MAP_NORM, NUM_STAGES
from .reader import check_format, read_checkpoint
from .remote import fetch

Source = str | os.PathLike


def load_checkpoint(
    source: Source, prefix: str | None = None, trust_pickle: bool = False
) -> dict[str, Tensor]:
    """Reads the ConvNeXt of any known checkpoint, safely.

    Args:
        source: A file, ``https://...``, ``hf://org/name[/file]`` or
            ``timm://name``.
        prefix: Which network, where the checkpoint holds several.
        trust_pickle: Vouch for a file you made yourself: its pickle is
            executed, whatever it holds.

    Returns:
        State dict of :class:`convnext_mm.ConvNeXt`, complete; output norms only
        where the checkpoint has them, a classifier's final norm not.

    Raises:
        CheckpointError: The message says what is wrong and what to do.

    Examples:
        >>> state_dict = load_checkpoint('convnext_tiny_22k_224.pth')
    """
    state, report = read_backbone(source, prefix, trust_pickle)
    with _naming(source):
        check_complete(state, report)
    _log_findings(source, report)
    return without_final_norm(state, report)


def check_source(source: Source) -> None:
    """Looks at a local checkpoint before anything is built for it; an address
    is not asked.

    Raises:
        CheckpointFileError: There is no such file, or it is no checkpoint.
    """
    if '://' not in str(source):
        check_format(source)


def convert_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Gives the ConvNeXt in a loaded checkpoint our names and shapes.

    Args:
        state_dict: A state dict of any known family, wrapped or not.

    Returns:
        The complete state dict of :class:`convnext_mm.ConvNeXt`, as
        :func:`load_checkpoint` gives it, and the name of the family.

    Raises:
        CheckpointError: No ConvNeXt, several, or an incomplete one.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            'state_dict must be a dictionary of tensors, got '
            f'{type(state_dict).__name__}'
        )
    state, report = convert(state_dict)
    check_complete(state, report)
    _log_findings('the state dict', report)
    return without_final_norm(state, report), report.family.name


def read_backbone(
    source: Source, prefix: str | None = None, trust_pickle: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """As :func:`load_checkpoint`, with the report, a final norm as
    ``final_norm.*``, and without a check that it is complete."""
    checkpoint = read_checkpoint(fetch(source), trust_pickle=trust_pickle)
    with _naming(source):
        return convert(checkpoint, prefix)


def without_final_norm(
    state: Mapping[str, Tensor], report: Report
) -> dict[str, Tensor]:
    """The state dict without a classifier's last norm, which becomes a leftover
    in the report."""
    final = [name for name in state if name.startswith(FINAL_NORM)]
    if final:
        report.leftovers.setdefault('final norm', []).extend(
            report.used.pop(name) for name in final
        )
    return {name: t for name, t in state.items() if name not in final}


class NoWeightsError(CheckpointMismatchError):
    """A model is loaded, and there is nothing for the ConvNeXt in it."""


class AnyFamily(nn.Module):
    """A backbone that takes the weights of any family: all, or none and a
    ``CheckpointError``. Reached from every way to load a model that holds it.

    Attributes:
        allow_partial (bool): Take what fits.
    """

    allow_partial: bool

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        convert_in_place(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def load_pretrained(
    backbone: AnyFamily, source: Source, prefix: str | None = None
) -> None:
    """Loads a checkpoint into a :class:`convnext_mm.ConvNeXt`: all that the
    backbone has, or nothing and an error.

    Args:
        backbone: The model; its ``allow_partial`` and
            ``gap_before_final_norm`` count.
        source: As for :func:`load_checkpoint`.
        prefix: Which network, where the checkpoint holds several.

    Raises:
        CheckpointError: It cannot be read, or does not fit.
    """
    state, report = read_backbone(source, prefix)
    with _naming(source):
        fitted = fit(backbone, state, report)
    params = dict(backbone.named_parameters())
    if any(param.is_meta for param in params.values()):
        raise CheckpointMismatchError(
            f'{shown(source)}: the backbone lies on the meta device, without '
            "memory for weights: call to_empty(device='cpu') first"
        )
    with torch.no_grad():
        for name, tensor in fitted.items():
            params[name].copy_(tensor)
    _log_findings(source, report)


def convert_in_place(
    backbone: AnyFamily, state_dict: dict[str, Tensor], prefix: str
) -> None:
    """Gives the part of a whole model's state dict that is for the backbone our
    names, whichever family's it has, and checks that it is complete.

    Args:
        backbone: A :class:`convnext_mm.ConvNeXt` that is about to load.
        state_dict: Of the whole model; changed where names differ.
        prefix: Of the backbone's names in it.

    Raises:
        CheckpointError: The backbone's part is missing, is not a ConvNeXt, or
            does not fit.
    """
    keys = [
        key for key in state_dict if isinstance(key, str) and key.startswith(prefix)
    ]
    where = f'the state dict behind {prefix!r}' if prefix else 'the state dict'
    if not keys and backbone.allow_partial:
        return
    part = {key[len(prefix) :]: state_dict[key] for key in keys}
    with _naming(where):
        if not keys:
            raise NoWeightsError(
                'there are no weights for the ConvNeXt (allow_partial=True on '
                'it leaves it as it is)'
            )
        state, report = convert(part)
        fitted = fit(backbone, state, report)
    if all(
        name in fitted and fitted[name].shape == tensor.shape
        for name, tensor in part.items()
    ):
        return  # our own names
    for key in keys:
        del state_dict[key]
    state_dict.update({prefix + name: t for name, t in fitted.items()})
    _log_findings('the backbone', report)


def fit(
    backbone: nn.Module, state: Mapping[str, Tensor], report: Report
) -> dict[str, Tensor]:
    """What of a converted state dict goes into which parameter of a backbone.

    Args:
        backbone: A :class:`convnext_mm.ConvNeXt`.
        state: Of :func:`convnext_mm.checkpoint.convert.convert`.
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
    state = dict(state)
    obstacles = list(report.obstacles)
    _place_last_norm(backbone, state, params, obstacles)
    num_stages = len(backbone.stages)
    _adapt_stem(state, params)
    needed = {name.split('.')[0] for name in state}
    needed |= {'stages', 'downsample_layers'}
    missing = [
        name for name in params if name not in state and name.split('.')[0] in needed
    ]
    wrong = [
        name
        for name, param in params.items()
        if name in state and state[name].shape != param.shape
    ]
    too_large = {
        name: value
        for name, param in params.items()
        if name in state
        and name not in wrong
        and (value := overflow(state[name], param.dtype))
    }
    if too_large:
        name, value = next(iter(too_large.items()))
        obstacles.append(
            f'{len(too_large)} parameters hold more than the dtype of the '
            f"backbone's can, such as {name}, {value:.3g} in "
            f'{params[name].dtype}: take an undamaged checkpoint, or a wider '
            'dtype'
        )
    extra = report.leftovers.get(INSIDE, []) + [
        name for name in state if name not in params and _stage(name) < num_stages
    ]
    if obstacles or missing or wrong or extra:
        message = _diagnose(
            params, state, report, obstacles, sorted(missing), wrong, extra
        )
        if not backbone.allow_partial:
            raise CheckpointMismatchError(
                f'{message}\nNothing was loaded. To load what fits and leave '
                'the rest as it is: allow_partial=True on the backbone'
            )
        if len(missing) + len(wrong) + len(too_large) >= len(params):
            raise CheckpointMismatchError(
                f'{message}\nNothing fits, not even with allow_partial'
            )
        print_log(
            f'allow_partial: {message}\nThe rest is loaded',
            logger='current',
            level=logging.WARNING,
        )
    fitted = {
        name: tensor
        for name, tensor in state.items()
        if name in params and name not in wrong and name not in too_large
    }
    _note_unused(state, params, report)
    _log_norms(params, fitted)
    return fitted


def _stage(name: str) -> int:
    """Stage of a parameter of ours; norms belong to none (a large number)."""
    part, number = name.split('.')[:2]
    return int(number) if part in ('stages', 'downsample_layers') else 99


def _place_last_norm(
    backbone: nn.Module,
    state: dict[str, Tensor],
    params: Mapping[str, Tensor],
    obstacles: list[str],
) -> None:
    """Makes a classifier's last norm the output norm of the last stage, where
    both do the same and the checkpoint has no such output norm."""
    ours = f'norm{NUM_STAGES - 1}'
    leaves = ('weight', 'bias')
    if f'{ours}.weight' not in params or any(
        f'{ours}.{leaf}' in state for leaf in leaves
    ):
        return
    of_map = any(f'{MAP_NORM}.{leaf}' in state for leaf in leaves)
    if of_map and backbone.gap_before_final_norm:
        obstacles.append(
            "the checkpoint's network normalises its last map and then pools "
            "(timm's head_norm_first, norm_pre), the backbone does it the "
            'other way round: emit maps, gap_before_final_norm=False'
        )
        return
    if not of_map and not backbone.gap_before_final_norm:
        return
    theirs = MAP_NORM if of_map else FINAL_NORM
    for leaf in leaves:
        if f'{theirs}.{leaf}' in state:
            state[f'{ours}.{leaf}'] = state.pop(f'{theirs}.{leaf}')
    if of_map:
        print_log(
            f'norm_pre, which normalises the last map, becomes {ours}', logger='current'
        )


def overflow(tensor: Tensor, dtype: torch.dtype) -> float:
    """The largest finite magnitude in a tensor if ``dtype`` cannot hold it,
    else 0."""
    if torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return 0.0
    if tensor.element_size() == 1:  # much is not implemented for fp8
        tensor = tensor.float()
    largest = tensor.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()
    return 0.0 if math.isfinite(largest.to(dtype)) else float(largest)


def _adapt_stem(state: dict[str, Tensor], params: Mapping[str, Tensor]) -> None:
    """Makes the stem of an RGB network take another number of channels.

    Fewer channels get the average over red, green and blue; more repeat them in
    turn. Both are scaled by 3 / in_channels, so that an image whose channels
    are all alike gives (for a multiple of 3, and for fewer than 3 channels,
    exactly) what it gave before.
    """
    name = 'downsample_layers.0.0.weight'
    if name not in state:
        return
    weight, wanted = state[name], params[name].shape[1]
    if weight.shape[1] != 3 or wanted == 3:
        return
    weight = weight.double()
    if wanted < 3:
        weight = weight.mean(1, keepdim=True).repeat(1, wanted, 1, 1)
    else:
        weight = weight[:, torch.arange(wanted) % 3]
    weight = weight * (3 / wanted)
    # What the parameter cannot hold is for fit to report.
    held = weight.to(params[name].dtype)
    state[name] = held if bool(held.isfinite().all()) else weight
    print_log(
        f'The checkpoint takes 3 channels, the backbone {wanted}: the '
        f'stem is {"averaged" if wanted < 3 else "repeated"} over channels '
        f'and scaled by 3 / {wanted}',
        logger='current',
    )


def _diagnose(
    params: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    report: Report,
    obstacles: list[str],
    missing: list[str],
    wrong: list[str],
    extra: list[str],
) -> str:
    """What differs between a checkpoint and a backbone, in a few lines."""
    theirs, ours = report.spec, infer_spec(params)
    lines = [f'{report.headline()}, does not fit the backbone ({ours}):']
    lines += [f'- {hint}' for hint in obstacles + _hints(theirs, ours)]
    for what, names in (
        ('missing in the checkpoint', missing),
        ('not in the backbone', extra),
    ):
        if names:
            lines.append(f'- {len(names)} parameters {what}: {_group(names)}')
    if wrong:
        lines.append(
            f'- {len(wrong)} parameters of another shape, such as '
            + ', '.join(
                f'{name} {tuple(state[name].shape)}, in the backbone '
                f'{tuple(params[name].shape)}'
                for name in wrong[:2]
            )
        )
    return '\n'.join(lines)


def _hints(theirs: Spec, ours: Spec) -> list[str]:
    n = min(len(theirs.depths), len(ours.depths))
    hints = []
    if n < len(ours.depths):
        hints.append(
            f'the checkpoint has only the first {n} stages: emit no '
            'later ones (out_indices), or take another checkpoint'
        )
    if (theirs.depths[:n], theirs.channels[:n]) != (ours.depths[:n], ours.channels[:n]):
        arch = (
            repr(theirs.arch)
            if '(' not in theirs.arch and ' or ' not in theirs.arch
            else theirs.arch
        )
        hints.append(
            f'the checkpoint is {theirs.arch}, the config says '
            f'{ours.arch}: set arch={arch}'
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
    for setting in ('in_channels', 'stem_patch_size', 'kernel_size'):
        value = getattr(theirs, setting)
        if value != getattr(ours, setting):
            reason = (
                f'its first layer has {value} channels'
                if setting == 'in_channels'
                else f'its {setting} is {value}'
            )
            hints.append(
                f'{reason}, the backbone {getattr(ours, setting)}: '
                f'set {setting}={value}'
            )
    ratios = {h / c for h, c in zip(theirs.hidden, theirs.channels) if c}
    if len(ratios) == 1 and ratios != {
        h / c for h, c in zip(ours.hidden, ours.channels)
    }:
        hints.append(f'its mlp_ratio is {ratios.pop():g}: set mlp_ratio')
    return hints


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


def _note_unused(
    state: Mapping[str, Tensor], params: Mapping[str, Tensor], report: Report
) -> None:
    for name in state:
        if name in params:
            continue
        if name.startswith(FINAL_NORM):
            label = 'final norm'
        elif name.startswith('norm'):
            label = 'output norms that the model does not build'
        else:
            label = 'stages that the model does not build'
        report.leftovers.setdefault(label, []).append(report.used[name])


def _log_norms(params: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> None:
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


def _log_findings(source: Source, report: Report) -> None:
    print_log(
        f'Weights of {shown(source)}: {report.headline()}, {len(report.used)} tensors',
        logger='current',
    )
    if report.leftovers:
        print_log(f'Left out: {report.leftover_line()}', logger='current')
    warn_not_finite(report)


def warn_not_finite(report: Report) -> None:
    """Names weights that are NaN or Inf."""
    if report.not_finite:
        print_log(
            f'{len(report.not_finite)} weights hold NaN or Inf: '
            f'{summarise(report.not_finite, 10)}',
            logger='current',
            level=logging.WARNING,
        )


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Puts the source before the message of a checkpoint error."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f'{shown(source)}: {error}') from error
