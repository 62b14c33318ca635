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

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.infer.infer import BaseInferencer
from mmengine.logging import print_log
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
    NoWeightsError,
    naming,
    quoted,
    shown,
)
from .families import recognise
from .load import AnyFamily, load_pretrained
from .orders import without_orders
from .reader import read_checkpoint
from .remote import fetch
from .resume import check_state, checked_scheduler_state

# MMEngine's names for addresses.
NAMED_ADDRESSES = {
    'torchvision': mmengine_checkpoint.get_torchvision_models,
    'modelzoo': mmengine_checkpoint.get_torchvision_models,
    'open-mmlab': mmengine_checkpoint.get_external_models,
    'openmmlab': mmengine_checkpoint.get_external_models,
    'mmcls': mmengine_checkpoint.get_mmcls_models,
}
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
        path, see :func:`.orders.without_orders`.

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
    with naming(filename):
        content = without_orders(content)
    if scheme == 'mmcls':
        return mmengine_checkpoint._process_mmcls_checkpoint(content)
    return content


def load_state_dict(
    module: nn.Module, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
) -> None:
    """``mmengine.runner.checkpoint.load_state_dict``; where there is nothing
    for a ConvNeXt, the refusal says where its weights lie instead.

    Raises:
        CheckpointMismatchError: ``state_dict`` has no weights, or not all, for
            a ConvNeXt in ``module``; or, where it is strict, other names or shapes.
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
    except RuntimeError as error:  # MMEngine's, where it is strict
        _, *lines = filter(None, map(str.strip, str(error).splitlines()))
        raise CheckpointMismatchError(
            f'its weights are not those of {type(module).__name__}: '
            + '; '.join(shown(line) for line in lines[:4])
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


def load_scheduler(scheduler: _ParamScheduler, state_dict: Any) -> None:
    """``_ParamScheduler.load_state_dict``; it takes its own state only."""
    _load_scheduler(scheduler, checked_scheduler_state(scheduler, state_dict))
