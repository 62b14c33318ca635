"""State to resume: an optimizer and a scheduler take what is their own."""

import inspect
from numbers import Real
from typing import Any

import torch
from mmengine.optim import _ParamScheduler
from torch import Tensor, nn

from .errors import CheckpointMismatchError, shown
from .orders import is_count, is_number

# How an optimizer computes, not what.
IMPLEMENTATION_KEYS = ('fused', 'foreach', 'capturable', 'differentiable')


def check_state(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """Looks at a state to load (fused optimizers do not, and would write beyond
    it), and gives it this run's choice of implementation: ``fused`` and
    ``foreach`` come along with a checkpoint, and would undo what the config
    says.

    Raises:
        CheckpointMismatchError: It is of another model or optimizer.
    """
    own, groups = optimizer.param_groups, state_dict.get('param_groups')
    states = state_dict.get('state')
    if not (
        isinstance(groups, list)
        and isinstance(states, dict)
        and len(groups) == len(own)
        and all(map(_has_as_many, groups, own))
    ):
        raise CheckpointMismatchError(
            'the state of the optimizer has not the groups of parameters of '
            f'this run ({[len(mine["params"]) for mine in own]})'
        )
    loaded, states = [], dict(states)
    for mine, group in zip(own, groups):
        _check_settings(group, mine)
        loaded.append(
            {**group, **{key: mine[key] for key in IMPLEMENTATION_KEYS if key in mine}}
        )
        kept = _kept_for_a_parameter(optimizer, {**mine, **loaded[-1]})
        for index, param in zip(group['params'], mine['params']):
            if states.get(index) is not None:
                states[index] = _state_of(param, states[index], kept)
    return {**state_dict, 'param_groups': loaded, 'state': states}


def _has_as_many(group: Any, mine: dict[str, Any]) -> bool:
    """Whether a group to load has the number of parameters of this run's."""
    return (
        isinstance(group, dict)
        and type(group.get('params')) is list
        and len(group['params']) == len(mine['params'])
        and all(type(index) is int for index in group['params'])
    )


def _check_settings(group: dict[str, Any], mine: dict[str, Any]) -> None:
    for key in dict.fromkeys(('lr', *group)):
        if key not in mine or key == 'params' or _are_alike(group.get(key), mine[key]):
            continue
        raise CheckpointMismatchError(
            f'the state of the optimizer has {shown(key)}='
            f'{shown(group.get(key))} where this run has {shown(mine[key])}'
        )


def _state_of(param: Tensor, state: Any, kept: dict[str, bool]) -> dict[str, Any]:
    """The state for a parameter, each map in the parameter's layout.

    Args:
        kept: What the optimizer keeps, of :func:`_kept_for_a_parameter`.
    """
    if not isinstance(state, dict) or not _is_kept(param, state, kept):
        found = (
            ', '.join(
                f'{shown(key)} {tuple(getattr(value, "shape", ()))}'
                for key, value in state.items()
            )
            if isinstance(state, dict)
            else shown(state)
        )
        raise CheckpointMismatchError(
            'the state of the optimizer is not of this model and '
            f'optimizer: for a parameter of {tuple(param.shape)} it has {found}'
        )
    # Elements are taken in the order in which they lie in memory.
    return {
        key: torch.empty_like(
            param, dtype=value.dtype, device=value.device, requires_grad=False
        ).copy_(value)
        if kept.get(key) and value.stride() != param.stride()
        else value
        for key, value in state.items()
    }


def _is_kept(param: Tensor, state: dict[str, Any], kept: dict[str, bool]) -> bool:
    return not kept or (
        state.keys() == kept.keys()
        and all(
            _is_like(state[key], param) if is_map else is_number(state[key])
            for key, is_map in kept.items()
        )
    )


def _is_like(value: Any, param: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == param.shape
        and value.layout == param.layout
        and not value.is_complex()
    )


def _kept_for_a_parameter(
    optimizer: torch.optim.Optimizer, group: dict[str, Any]
) -> dict[str, bool]:
    """What one of torch's optimizers keeps for a parameter, tried on one, and
    whether in its shape; nothing where it is not torch's."""
    if not type(optimizer).__module__.startswith('torch.optim.'):
        return {}
    accepted = inspect.signature(type(optimizer)).parameters
    options = {
        key: value
        for key, value in group.items()
        if key in accepted and key not in ('params', *IMPLEMENTATION_KEYS)
    }
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.zeros(1)
    try:
        trial = type(optimizer)([param], **options)
        trial.step()
    # L-BFGS wants a closure, SparseAdam sparse gradients.
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {
        key: isinstance(value, Tensor) and value.dim() > 0
        for key, value in trial.state[param].items()
    }


def checked_scheduler_state(scheduler: _ParamScheduler, state: Any) -> dict[str, Any]:
    """What a scheduler may take: it would set any attribute.

    Raises:
        CheckpointMismatchError: It is the state of another scheduler.
    """
    own = scheduler.state_dict()
    if isinstance(state, dict):
        # A function (of OneCycleLR) stays this run's own.
        state = {k: value for k, value in state.items() if not callable(own.get(k))}
        different = [
            key
            for key, value in state.items()
            if key not in own
            or not _are_alike(value, own[key])
            or (isinstance(own[key], str) and value != own[key])
        ]
    else:
        different = ['type']
    if different:
        raise CheckpointMismatchError(
            f'the state of a {type(scheduler).__name__} is not of this run: '
            f'{shown(different[0])} differs; resume with the param_scheduler '
            'that it was saved with'
        )
    return state


def _are_alike(value: Any, own: Any) -> bool:
    """Whether a stored setting has the type of a run's own."""
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, (Real, Tensor)):
        return is_number(value) and not isinstance(value, bool)
    if isinstance(own, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(own)
            and all(map(_are_alike, value, own))
        )
    if isinstance(own, dict):
        return isinstance(value, dict) and all(
            is_count(key) or (key in own and _are_alike(value[key], own[key]))
            for key in value
        )
    return isinstance(value, type(own))
