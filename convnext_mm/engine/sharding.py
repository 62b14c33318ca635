"""Training of models that one device does not hold: weights, gradients and the
state of the optimizer in shards, one for each process (PyTorch's FSDP2)."""

from functools import partial
from typing import Any

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner as MMEngineRunner
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from convnext_mm.analysis.scaling import shard_dim
from convnext_mm.models.block import Block, Downsample
from convnext_mm.registry import MODEL_WRAPPERS, register

from .errors import ConfigError

FULLY_SHARD = ('FullyShard', 'convnext_mm.FullyShard')
ADVICE = "set model_wrapper_cfg=dict(type='convnext_mm.FullyShard')"


def check_sharding(cfg: Config) -> None:
    """Looks for what would hang, or end in checkpoints that nothing resumes.

    Args:
        cfg: The whole config.

    Raises:
        ConfigError: It asks for a way to shard that does not work, or for
            something that sharded training cannot do.
    """
    strategy = (cfg.get('strategy') or {}).get('type')
    wrapper = (cfg.get('model_wrapper_cfg') or {}).get('type')
    runner = cfg.get('runner_type')
    optim_wrapper = cfg.get('optim_wrapper') or {}
    optimizer = (optim_wrapper.get('optimizer') or {}).get('type')
    if _is_named(strategy, 'FSDPStrategy'):
        raise ConfigError(
            f'strategy.type={strategy!r} clips gradients by a norm of one shard and '
            "saves checkpoints that do not resume: leave runner_type='FlexibleRunner' "
            f'and strategy out, and {ADVICE}'
        )
    if _is_named(wrapper, 'MMFullyShardedDataParallel'):
        raise ConfigError(
            f'model_wrapper_cfg.type={wrapper!r} saves checkpoints that do not '
            f'resume: {ADVICE}'
        )
    if _is_named(optimizer, 'ZeroRedundancyOptimizer'):
        raise ConfigError(
            f'optim_wrapper.optimizer.type={optimizer!r} waits for ever at the first '
            f"checkpoint: take type='AdamW', and to shard its state {ADVICE}"
        )
    if not is_sharded(cfg):
        return
    if not hasattr(torch.distributed.fsdp, 'fully_shard'):
        raise ConfigError(
            f'model_wrapper_cfg.type={wrapper!r} needs PyTorch 2.6 or newer, this is '
            f'{torch.__version__}: update it, or leave model_wrapper_cfg out'
        )
    if runner is not None:
        raise ConfigError(
            f'runner_type={runner!r} does not know model_wrapper_cfg.type={wrapper!r}: '
            'leave runner_type out'
        )
    for hook in cfg.get('custom_hooks') or ():
        if isinstance(hook, dict) and _is_named(hook.get('type'), 'EMAHook'):
            raise ConfigError(
                f'custom_hooks has {hook["type"]!r}, which copies the whole model, and '
                f'model_wrapper_cfg.type={wrapper!r} shards it: leave one of them out'
            )


def is_sharded(cfg: Config) -> bool:
    """Whether a config asks for :class:`FullyShard`."""
    return (cfg.get('model_wrapper_cfg') or {}).get('type') in FULLY_SHARD


def _is_named(kind: Any, name: str) -> bool:
    """Whether the type in a config is that of MMEngine with this name."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2] == name


@register(MODEL_WRAPPERS)
class FullyShard(nn.Module):
    """A model whose weights lie in shards while it trains.

    Each process keeps one part of every weight, of its gradient and of its
    optimizer state. A unit's weights are gathered just before the unit runs,
    forward and backward, and then dropped; gradients are averaged over all
    processes, as ``DistributedDataParallel`` does, and each process gets its
    part. Units are each block of a ConvNeXt, each layer between its stages, and
    what is left of the model. Numbers are those of ``DistributedDataParallel``,
    also with gradient accumulation, clipping (by the norm of all shards) and
    mixed precision: weights are gathered and gradients averaged in the dtype
    that they have, fp32, and autocast casts weights where they are used. (FSDP's
    own policy would also keep in bfloat16 what autocast leaves in fp32: norms,
    losses, boxes.)

    The model is whole until :class:`ShardableRunner` builds its optimizer, so a
    test runs as without this. Validation gathers all weights once, and drops
    them when training goes on: processes may then see different numbers of
    images. The main process's ``state_dict()`` of the model, and of the optimizer,
    has whole tensors under the names that they have in every other run; all
    processes must call it together.

    Args:
        module: The model, on its device.

    Raises:
        ConfigError: It has no ConvNeXt, or a weight that is a scalar.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module
        self.sharded = False
        self._units: list[Any] = units_of(module)
        if not self._units:
            raise ConfigError(
                'FullyShard shards the blocks of convnext_mm.ConvNeXt, and '
                f'{type(module).__name__} has none: leave model_wrapper_cfg out'
            )
        for name, param in module.named_parameters():
            if param.dim() == 0:
                raise ConfigError(
                    f'FullyShard cannot shard the scalar {name} of '
                    f'{type(module).__name__}: leave model_wrapper_cfg out'
                )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """As the model's; gradients that are only accumulated stay local.

        Raises:
            ConfigError: A runner that knows nothing of shards built the optimizer.
        """
        if not self.sharded:
            raise ConfigError(
                "FullyShard needs this project's runner: train with tools/train.py, "
                'or with convnext_mm.engine.runner.Runner'
            )
        self.module.set_requires_gradient_sync(optim_wrapper.should_sync())
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """As the model's."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """As the model's."""
        return self.module.test_step(data)

    def train(self, mode: bool = True) -> 'FullyShard':
        """Sets the mode, in all processes at once: evaluation mode gathers the
        weights, training mode drops them."""
        if self.sharded:
            for unit in self._units:
                unit.set_reshard_after_forward(mode, recurse=False)
            for unit in (*self._units, self.module):
                if mode:
                    unit.reshard()
                else:
                    unit.unshard()
        return super().train(mode)

    def shard(self) -> None:
        """Shards the weights, which must be the same in all processes."""
        name = type(self.module).__name__  # which FSDP changes
        device, count = get_device(), torch.distributed.get_world_size()
        fully_shard = partial(
            torch.distributed.fsdp.fully_shard,
            mesh=init_device_mesh(device, (count,)),
            shard_placement_fn=partial(_placement, count=count),
        )
        for unit in (*self._units, self.module):
            fully_shard(unit)
        for module in self.module.modules():
            if module._parameters:
                module.register_load_state_dict_pre_hook(_distribute_weights)
        self.module.register_state_dict_post_hook(_gather_weights)
        self.sharded = True
        print_log(
            f'{name}: weights in {count} shards, {len(self._units) + 1} units.',
            'current',
        )

    def serve(self, optim_wrapper: OptimWrapper) -> None:
        """Makes the optimizer of the shards give and take whole states, and log the
        norm of all gradients.

        Args:
            optim_wrapper: As the runner builds it.

        Raises:
            ConfigError: It is of several optimizers.
        """
        if not isinstance(optim_wrapper, OptimWrapper):
            raise ConfigError(
                f'FullyShard serves one optimizer, not {type(optim_wrapper).__name__}: '
                'leave model_wrapper_cfg out'
            )
        optimizer = optim_wrapper.optimizer
        optimizer.register_load_state_dict_pre_hook(_distribute_state)
        optimizer.register_state_dict_post_hook(_gather_state)
        if optim_wrapper.clip_grad_kwargs:
            optim_wrapper.clip_func = partial(_clip, optim_wrapper.clip_func)


class ShardableRunner(MMEngineRunner):
    """MMEngine's runner, for models that may be :class:`FullyShard`.

    Attributes:
        saves_together (bool): Whether a process needs the others to save.
    """

    saves_together = False

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """As MMEngine's; a model to shard is initialised and sharded first."""
        model = self.model
        if not isinstance(model, FullyShard):
            return super().build_optim_wrapper(optim_wrapper)
        if not model.sharded:
            self.saves_together = True
            super()._init_model_weights()
            model.shard()
        built = super().build_optim_wrapper(optim_wrapper)
        if built is not optim_wrapper:
            model.serve(built)
        return built

    def _init_model_weights(self) -> None:
        if not isinstance(self.model, FullyShard):
            super()._init_model_weights()


def units_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered as one: each block of a ConvNeXt and each layer between its
    stages."""
    return [m for m in model.modules() if isinstance(m, (Block, Downsample))]


def parameters_of_units(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of each of a model's units; last, what is left of it."""
    units = [list(unit.parameters()) for unit in units_of(model)]
    inside = {param for unit in units for param in unit}
    return [*units, [param for param in model.parameters() if param not in inside]]


def _placement(param: nn.Parameter, count: int) -> Any:
    return torch.distributed.tensor.Shard(shard_dim(param.shape, count))


def _is_sharded(value: Any) -> bool:
    return isinstance(value, torch.distributed.tensor.DTensor)


def _distribute(whole: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that all have, as of the weight ``like``."""
    tensor = torch.distributed.tensor
    return tensor.DTensor.from_local(
        whole.detach().to(like.device),
        like.device_mesh,
        [tensor.Replicate()],
        run_check=False,
    ).redistribute(placements=like.placements)


def _distribute_weights(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    for name, param in module.named_parameters(prefix[:-1], recurse=False):
        value = state_dict.get(name)
        # What does not fit, the module itself refuses.
        if value is not None and value.shape == param.shape and not _is_sharded(value):
            state_dict[name] = _distribute(value, param)


def _distribute_state(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """After :func:`convnext_mm.checkpoint.resume.check_state`."""
    states = dict(state_dict['state'])
    for mine, group in zip(optimizer.param_groups, state_dict['param_groups']):
        for index, param in zip(group['params'], mine['params']):
            if index in states:
                states[index] = apply_to(
                    states[index],
                    lambda x, param=param: getattr(x, 'shape', None) == param.shape,
                    partial(_distribute, like=param),
                )
    return {**state_dict, 'state': states}


def _gather(shard: Any) -> Tensor:
    """The whole tensor, on the CPU, in the main process; the shard in others."""
    whole: Tensor = shard.full_tensor()
    return whole.cpu() if is_main_process() else shard


def _gather_weights(module: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    for name, value in state_dict.items():
        if _is_sharded(value):
            state_dict[name] = _gather(value)


def _gather_state(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    return apply_to(state_dict, _is_sharded, _gather)


def _clip(clip_func: Any, *args: Any, **kwargs: Any) -> Any:
    norm = clip_func(*args, **kwargs)
    return norm.full_tensor() if _is_sharded(norm) else norm
