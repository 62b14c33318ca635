"""The one door between checkpoints and MMEngine.

``import convnext_mm`` installs it for the whole process; MMEngine imports
convnext_mm itself when it builds a type of this package. From then on
``load_from``, ``resume``, every ``Pretrained`` initializer, the inferencers and
``mmengine.runner.load_checkpoint``, of our tools or of the stock ones,

- read files with :func:`.reader.read_checkpoint`, never as pickles;
- see no string of a file that they would run as code or use as a path;
- give a ConvNeXt all of its weights, or raise a ``CheckpointError``;
- do not take the state of an optimizer or scheduler that is not theirs.
"""

import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.infer.infer import BaseInferencer
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule, PretrainedInit, update_init_info
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import Tensor, nn

from .errors import (
    CheckpointDownloadError,
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
    shown,
)
from .families import quoted, recognise
from .load import AnyFamily, NoWeightsError, load_pretrained
from .reader import read_checkpoint
from .remote import fetch

# MMEngine's names for addresses.
NAMED_ADDRESSES = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}
# How an optimizer computes, not what.
IMPLEMENTATION_KEYS = ('fused', 'foreach', 'capturable', 'differentiable')
_load_state_dict = mmengine_checkpoint.load_state_dict
_initialize = PretrainedInit.__call__
_init_weights = BaseModule.init_weights
_init_inferencer_model = BaseInferencer._init_model
_init_optim_wrapper = OptimWrapper.__init__
_load_scheduler = _ParamScheduler.load_state_dict


def install() -> None:
    """Puts the functions below into MMEngine's places. Twice is as once."""
    mmengine_checkpoint.CheckpointLoader.load_checkpoint = staticmethod(
        load_for_mmengine
    )
    mmengine_checkpoint.load_state_dict = load_state_dict
    PretrainedInit.__call__ = initialize
    BaseModule.init_weights = init_weights
    BaseInferencer._init_model = init_inferencer_model
    OptimWrapper.__init__ = init_optim_wrapper
    _ParamScheduler.load_state_dict = load_scheduler


def load_for_mmengine(
    filename: str, map_location: Any = None, logger: Any = 'current'
) -> dict[str, Any]:
    """``CheckpointLoader.load_checkpoint``, executing nothing.

    Args:
        filename: A path, ``https://``, ``hf://``, ``timm://`` address, or one
            of MMEngine's ``torchvision://`` and ``open-mmlab://`` names.
        map_location: Not used: tensors come on the CPU, and models and
            optimizers take them to their own device.
        logger: For one line.

    Returns:
        The dictionary in the file without what MMEngine would run or use as a
        path, see :func:`without_orders`.

    Raises:
        CheckpointError: It cannot be fetched or read, or is not safe.
    """
    print_log(f'Loads checkpoint from: {shown(filename)}', logger=logger)
    scheme, _, name = str(filename).partition('://')
    if scheme in NAMED_ADDRESSES:
        addresses = NAMED_ADDRESSES[scheme]()
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
        if name not in addresses:
            raise CheckpointDownloadError(
                f'{shown(filename)}: MMEngine knows no such name'
            )
        filename = addresses[name]
    content = read_checkpoint(fetch(filename))
    try:
        content = without_orders(content)
    except CheckpointError as error:
        raise type(error)(f'{shown(filename)}: {error}') from error
    if scheme == 'mmcls':
        return mmengine_checkpoint._process_mmcls_checkpoint(content)
    return content


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
    for key in ('state_dict', 'ema_state_dict'):
        if key in content:
            content[key] = _state_dict(content[key], key)
    if 'state_dict' in content or 'meta' in content:
        meta = content.get('meta')
        content['meta'] = {
            key: value
            for key, value in (meta if isinstance(meta, dict) else {}).items()
            if key not in ('config', 'cfg')
            and (key not in ('epoch', 'iter', 'seed') or _is_count(value))
        }
    _check_beside_state(content.get('optimizer'))
    if 'message_hub' in content:
        content['message_hub'] = _numbers_of(content['message_hub'])
    return content


def _check_beside_state(optimizer: Any) -> None:
    """What optimizer wrappers keep beside the state of an optimizer, which
    looks at its own."""
    for key, own in optimizer.items() if isinstance(optimizer, dict) else ():
        if key not in ('loss_scaler', 'base_param_settings'):
            _check_beside_state(own if key != 'state' else None)
        elif not (
            isinstance(own, dict)
            and all(
                _is_number(own[name])
                for name in own
                if name
                in (
                    'lr',
                    'scale',
                    'growth_factor',
                    'backoff_factor',
                    'growth_interval',
                    '_growth_tracker',
                )
            )
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
    clean._metadata = OrderedDict(
        (name, dict(version=entry['version']))
        for name, entry in (metadata if isinstance(metadata, dict) else {}).items()
        if isinstance(entry, dict) and _is_count(entry.get('version'))
    )
    return clean


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    )


def _is_flag(key: str, value: Any) -> bool:
    return type(value) is bool


def _is_history(key: str, value: Any) -> bool:
    return isinstance(value, HistoryBuffer)


def _is_info(key: str, value: Any) -> bool:
    if key.startswith('keep_ckpt_ids'):
        return type(value) is list and all(map(_is_count, value))
    return value is None or _is_number(value)


def load_state_dict(
    module: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
) -> None:
    """``mmengine.runner.checkpoint.load_state_dict``; where there is nothing
    for a ConvNeXt, the refusal says where its weights lie instead.

    Raises:
        CheckpointMismatchError: ``state_dict`` has no weights, or not all, for
            a ConvNeXt in ``module``.
    """
    try:
        _load_state_dict(module, state_dict, *args, **kwargs)
    except NoWeightsError as error:
        found = recognise(_nested_names(state_dict))
        advice = (
            f'its ConvNeXt lies behind {quoted(found[0].prefix)}: to start '
            "from a backbone, set init_cfg=dict(type='Pretrained', "
            'checkpoint=...) on the backbone, not on the whole model, and '
            'leave load_from out'
            if found
            else 'it has no ConvNeXt weights'
        )
        raise CheckpointMismatchError(
            f'loading {type(module).__name__}: {error}; {advice}'
        ) from error


def _nested_names(state_dict: Mapping) -> Iterator[str]:
    for key, value in state_dict.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f'{key}.{inner}' for inner in value)


def initialize(init: PretrainedInit, module: nn.Module) -> None:
    """``PretrainedInit.__call__``: a ConvNeXt takes the checkpoint of any
    family; what holds one takes all of its weights."""
    try:
        if isinstance(module, AnyFamily):
            load_pretrained(module, init.checkpoint, init.prefix)
            if hasattr(module, '_params_init_info'):
                update_init_info(module, init_info=init._get_init_info())
        else:
            _initialize(init, module)
    except CheckpointError:
        raise
    except (AssertionError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointMismatchError(
            f'{shown(init.checkpoint)} does not fit {type(module).__name__}: '
            f'{shown(error)}'
        ) from error


def init_weights(module: BaseModule) -> None:
    """``BaseModule.init_weights``, with ``Pretrained`` last under any of its
    names. (MMEngine knows one; under the others, such as
    ``'mmengine.Pretrained'``, what follows overwrites the loaded weights.)

    Raises:
        ValueError: ``Pretrained`` in an ``override`` of a ConvNeXt, which loads
            a part of it.
    """
    init_cfg = module.init_cfg
    cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
    for cfg in cfgs:
        overrides = cfg.get('override') or []
        for override in [overrides] if isinstance(overrides, dict) else overrides:
            if isinstance(module, AnyFamily) and _is_pretrained(
                {'type': cfg.get('type'), **override}
            ):
                raise ValueError(
                    "init_cfg: type='Pretrained' in override=... would load a "
                    f'part of {type(module).__name__}; put it at the top level '
                    'of init_cfg, with prefix=... where the checkpoint holds '
                    'several networks'
                )
    try:
        if cfgs:
            module.init_cfg = [cfg for cfg in cfgs if not _is_pretrained(cfg)] + [
                {**cfg, 'type': _initializer(cfg)}
                for cfg in cfgs
                if _is_pretrained(cfg)
            ]
        _init_weights(module)
    finally:
        module.init_cfg = init_cfg


def _initializer(cfg: dict[str, Any]) -> Any:
    """The class that a config of an initializer names, as MMEngine finds it."""
    with WEIGHT_INITIALIZERS.switch_scope_and_registry(None) as registry:
        kind = cfg.get('type')
        return registry.get(kind) if isinstance(kind, str) else kind


def _is_pretrained(cfg: dict[str, Any]) -> bool:
    kind = _initializer(cfg)
    return isinstance(kind, type) and issubclass(kind, PretrainedInit)


def init_inferencer_model(
    inferencer: BaseInferencer, cfg: Any, weights: str | None, *args: Any, **kwargs: Any
) -> nn.Module:
    """``BaseInferencer._init_model``; a config is needed.

    Raises:
        CheckpointFileError: There is none. MMEngine would run the text that the
            checkpoint says is its config.
    """
    if not cfg:
        raise CheckpointFileError(
            f'{shown(weights)}: give the config as well (model=...): the one '
            'stored in a checkpoint is Python code, which is not run'
        )
    return _init_inferencer_model(inferencer, cfg, weights, *args, **kwargs)


def init_optim_wrapper(wrapper: OptimWrapper, *args: Any, **kwargs: Any) -> None:
    """``OptimWrapper.__init__``; the optimizer takes its own state only."""
    _init_optim_wrapper(wrapper, *args, **kwargs)
    wrapper.optimizer.register_load_state_dict_pre_hook(check_state)


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
        and all(
            isinstance(group, dict)
            and type(group.get('params')) is list
            and len(group['params']) == len(mine['params'])
            and all(type(index) is int for index in group['params'])
            for group, mine in zip(groups, own)
        )
    ):
        raise CheckpointMismatchError(
            'the state of the optimizer has not the groups of parameters of '
            f'this run ({[len(mine["params"]) for mine in own]})'
        )
    loaded, states = [], dict(states)
    for mine, group in zip(own, groups):
        for key in dict.fromkeys(('lr', *group)):
            if (
                key in mine
                and key != 'params'
                and not _are_alike(group.get(key), mine[key])
            ):
                raise CheckpointMismatchError(
                    f'the state of the optimizer has {shown(key)}='
                    f'{shown(group.get(key))} where this run has '
                    f'{shown(mine[key])}'
                )
        loaded.append(
            {**group, **{key: mine[key] for key in IMPLEMENTATION_KEYS if key in mine}}
        )
        kept = _kept_for_a_parameter(optimizer, {**mine, **loaded[-1]})
        for index, param in zip(group['params'], mine['params']):
            state = states.get(index)
            if state is None:
                continue
            if not (
                isinstance(state, dict)
                and (
                    not kept
                    or (
                        state.keys() == kept.keys()
                        and all(
                            _is_like(state[key], param)
                            if is_map
                            else _is_number(state[key])
                            for key, is_map in kept.items()
                        )
                    )
                )
            ):
                raise CheckpointMismatchError(
                    'the state of the optimizer is not of this model and '
                    f'optimizer: for a parameter of {tuple(param.shape)} it '
                    'has '
                    + (
                        ', '.join(
                            f'{shown(key)} {tuple(getattr(value, "shape", ()))}'
                            for key, value in state.items()
                        )
                        if isinstance(state, dict)
                        else shown(state)
                    )
                )
            # Elements are taken in the order in which they lie in memory.
            states[index] = {
                key: torch.empty_like(
                    param, dtype=value.dtype, device=value.device, requires_grad=False
                ).copy_(value)
                if kept.get(key) and value.stride() != param.stride()
                else value
                for key, value in state.items()
            }
    return {**state_dict, 'param_groups': loaded, 'state': states}


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


def load_scheduler(scheduler: _ParamScheduler, state_dict: dict[str, Any]) -> None:
    """``_ParamScheduler.load_state_dict``, which sets any attribute.

    Raises:
        CheckpointMismatchError: It is the state of another scheduler.
    """
    own = scheduler.state_dict()
    # A function (of OneCycleLR) stays this run's own.
    state = (
        {key: value for key, value in state_dict.items() if not callable(own.get(key))}
        if isinstance(state_dict, dict)
        else None
    )
    different = (
        ['type']
        if state is None
        else [
            key
            for key, value in state.items()
            if key not in own
            or not _are_alike(value, own[key])
            or (isinstance(own[key], str) and value != own[key])
        ]
    )
    if different:
        raise CheckpointMismatchError(
            f'the state of a {type(scheduler).__name__} is not of this run: '
            f'{shown(different[0])} differs; resume with the param_scheduler '
            'that it was saved with'
        )
    _load_scheduler(scheduler, state)


def _are_alike(value: Any, own: Any) -> bool:
    """Whether a stored setting has the type of a run's own."""
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, (Real, Tensor)):
        return _is_number(value) and not isinstance(value, bool)
    if isinstance(own, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(own)
            and all(map(_are_alike, value, own))
        )
    if isinstance(own, dict):
        return isinstance(value, dict) and all(
            _is_count(key) or (key in own and _are_alike(value[key], own[key]))
            for key in value
        )
    return isinstance(value, type(own))
