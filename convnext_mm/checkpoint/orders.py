"""What of a checkpoint comes through to MMEngine: weights, numbers and
histories, and no string that it would run as code or use as a path."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from numbers import Real
from typing import Any

from mmengine.logging import HistoryBuffer
from torch import Tensor

from .errors import CheckpointFileError, shown
from .families import SWAPPED_EMA

# Numbers beside the state of an optimizer.
SETTINGS = (
    'lr',
    'scale',
    'growth_factor',
    'backoff_factor',
    'growth_interval',
    '_growth_tracker',
)


def without_orders(content: dict[str, Any]) -> dict[str, Any]:
    """A read checkpoint without what MMEngine would act upon.

    It runs ``meta['config']``, ``meta['cfg']`` and the ``cfg`` of the message
    hub as Python, deletes the file or folder that ``best_ckpt`` of the message
    hub names, and builds file names from ``keep_ckpt_ids``. So neither
    configuration comes through, and of the message hub's ``runtime_info`` only
    numbers and lists of whole numbers.

    Raises:
        CheckpointFileError: A state dict or the message hub is no dictionary, a
            name of a weight no printable text, or text stands where the
            settings of an optimizer or loss scale are numbers.
    """
    content = (
        dict(content) if 'state_dict' in content else _state_dict(content, 'top level')
    )
    for key in ('state_dict', SWAPPED_EMA):
        if key in content:
            content[key] = _state_dict(content[key], key)
    if 'state_dict' in content or 'meta' in content:
        meta = content.get('meta')
        content['meta'] = {
            key: value
            for key, value in (meta if isinstance(meta, dict) else {}).items()
            if key not in ('config', 'cfg')
            and (key not in ('epoch', 'iter', 'seed') or is_count(value))
        }
    _check_beside_state(content.get('optimizer'))
    if 'message_hub' in content:
        content['message_hub'] = _numbers_of(content['message_hub'])
    return content


def _state_dict(state: Any, where: str) -> dict[str, Any]:
    if not isinstance(state, Mapping):
        raise CheckpointFileError(
            f'its {where} is a {type(state).__name__}, not a dictionary of weights'
        )
    for key in state:
        if not (isinstance(key, str) and key.isprintable()):
            raise CheckpointFileError(
                f'its {where} has the key {shown(key, 80)} '
                f'({type(key).__name__}): names of weights are printable text'
            )
    # As MMEngine's runner cuts names.
    if len({re.sub(r'^module.', '', key) for key in state}) < len(state):
        raise CheckpointFileError(
            f"its {where} has names with and without 'module.' before them, "
            'two networks in one place: keep those of one'
        )
    clean = OrderedDict(state)
    metadata = getattr(state, '_metadata', None)
    # Where torch keeps the versions of modules.
    vars(clean)['_metadata'] = OrderedDict(
        (name, dict(version=entry['version']))
        for name, entry in (metadata if isinstance(metadata, dict) else {}).items()
        if isinstance(entry, dict) and is_count(entry.get('version'))
    )
    return clean


def _check_beside_state(optimizer: Any) -> None:
    """What optimizer wrappers keep beside the state of an optimizer, which
    looks at its own."""
    for key, own in optimizer.items() if isinstance(optimizer, dict) else ():
        if key not in ('loss_scaler', 'base_param_settings'):
            _check_beside_state(own if key != 'state' else None)
        elif not isinstance(own, dict) or not all(
            is_number(value) for name, value in own.items() if name in SETTINGS
        ):
            raise CheckpointFileError(
                f'the {key} of its optimizer holds {shown(own)} where numbers belong'
            )


def _numbers_of(hub: Any) -> dict[str, Any]:
    """Of a message hub the histories, and the numbers of its information."""
    if not isinstance(hub, dict):
        raise CheckpointFileError(f'its message_hub is {shown(hub)}, not a dictionary')
    parts: dict[str, Any] = {
        name: {
            key: value
            for key, value in part.items()
            if isinstance(key, str) and key.isprintable() and keep(key, value)
        }
        for name, keep in (
            ('log_scalars', _is_history),
            ('runtime_info', _is_info),
            ('resumed_keys', _is_flag),
        )
        for part in [hub.get(name)]
        if isinstance(part, dict)
    }
    known = {
        key for name in ('log_scalars', 'runtime_info') for key in parts.get(name, ())
    }
    if 'resumed_keys' in parts:
        parts['resumed_keys'] = {
            key: flag for key, flag in parts['resumed_keys'].items() if key in known
        }
    return parts


def _is_flag(key: str, value: Any) -> bool:
    return type(value) is bool


def _is_history(key: str, value: Any) -> bool:
    return isinstance(value, HistoryBuffer)


def _is_info(key: str, value: Any) -> bool:
    if key.startswith('keep_ckpt_ids'):
        return type(value) is list and all(map(is_count, value))
    return value is None or is_number(value)


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or more."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is one real number, a tensor's or Python's."""
    return isinstance(value, Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )
