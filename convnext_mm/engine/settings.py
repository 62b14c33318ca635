"""What of a config was different when a checkpoint was saved."""

from collections.abc import Iterator
from typing import Any

from convnext_mm.checkpoint import CheckpointMismatchError
from convnext_mm.checkpoint.errors import shown

# What a checkpoint's optimizer and schedulers bring along, whatever a config says.
FIXED = (
    'optim_wrapper.constructor',
    'optim_wrapper.optimizer',
    'optim_wrapper.paramwise_cfg',
    'param_scheduler',
    'train_cfg.by_epoch',
    'train_cfg.type',
)
# How something is computed, not what.
FREE_NAMES = ('fused', 'foreach', 'capturable', 'differentiable')
# Where and how a run takes place.
OF_THE_PLACE = (
    'env_cfg',
    'launcher',
    'load_from',
    'log_level',
    'model_wrapper_cfg',
    'overwrite',
    'resume',
    'vis_backends',
    'visualizer',
    'work_dir',
)


def flatten(config: Any, prefix: str = '') -> dict[str, str]:
    """Dotted names to values as text, of nested dictionaries and lists."""
    return dict(_leaves(config, prefix))


def _leaves(node: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f'{name}.{key}' if name else str(key))
    elif isinstance(node, (list, tuple)) and any(isinstance(x, dict) for x in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f'{name}[{index}]')
    else:
        yield name, str(node)


def changes(before: dict[str, str], now: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Names of settings to their values before and now, without those of the place;
    ``'-'`` stands for a setting that was not there."""
    return {
        name: (before.get(name, '-'), now.get(name, '-'))
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name) and not _is_below(name, OF_THE_PLACE)
    }


def check_changes(changed: dict[str, tuple[str, str]]) -> None:
    """Refuses what a resumed run would not do.

    Raises:
        CheckpointMismatchError: Names the setting.
    """
    refused = [
        f'{name} was {shown(before, 80)} and is {shown(now, 80)}'
        for name, (before, now) in changed.items()
        if _is_below(name, FIXED) and name.rpartition('.')[2] not in FREE_NAMES
    ]
    if refused:
        raise CheckpointMismatchError(
            f'{"; ".join(refused[:5])}: the state of the optimizer and its schedules '
            'goes on as saved, so that this would have no effect; set it back, or '
            'start a new run from these weights: load_from=..., without --resume'
        )


def _is_below(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith((f'{top}.', f'{top}[')) for top in tops)
