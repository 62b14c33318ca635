"""Finds mistakes in a config before anything is built from it."""

import difflib
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from numbers import Integral, Real
from os.path import splitext
from typing import Any, Literal, NamedTuple

import mmengine.registry as registries
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import Registry
from mmengine.runner import FlexibleRunner, Runner

from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import SimplePyramid, StagedBackbone

CONFIG_SUFFIXES = ('.py', '.yaml', '.yml', '.json')
CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.ckpt', '.bin', '.pkl', '.safetensors')

# What every run builds, and what a run of one kind needs, then builds if given.
SECTIONS = (
    'model',
    'data_preprocessor',
    'model_wrapper_cfg',
    'default_hooks',
    'custom_hooks',
    'visualizer',
    'log_processor',
)
NEEDED = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
OPTIONAL = dict(
    train=('param_scheduler', 'val_dataloader', 'val_cfg', 'val_evaluator'), test=()
)
# Top-level keys with an effect: what runners take, and what is looked up.
KEYS = {
    key
    for runner in (Runner, FlexibleRunner)
    for key in inspect.signature(runner).parameters
} | {
    'allow_state_keys',
    'custom_imports',
    'data_help',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'max_unreadable_images',
    'model_wrapper_cfg',
    'overwrite',
    'runner_type',
    'sync_bn',
}
KEY_CUTOFF = 0.85  # of difflib; `models`, `conv_cfg` and the like must not be refused

# Patterns of dotted places, without the numbers of lists. The first that matches.
REGISTRIES = {
    r'model(\..+)?\.(backbone|neck|data_preprocessor|\w*head)': 'MODELS',
    r'model|data_preprocessor': 'MODELS',
    r'model_wrapper_cfg': 'MODEL_WRAPPERS',
    r'\w+_dataloader\.(.+\.)?datasets?': 'DATASETS',
    r'\w+_dataloader\.(.+\.)?pipeline|custom_hooks\.switch_pipeline': 'TRANSFORMS',
    r'\w+_dataloader\.(batch_)?sampler': 'DATA_SAMPLERS',
    r'\w+_dataloader\.collate_fn': 'FUNCTIONS',
    r'(train|val|test)_cfg': 'LOOPS',
    r'optim_wrapper': 'OPTIM_WRAPPERS',
    r'optim_wrapper(\.\w+)?\.optimizer': 'OPTIMIZERS',
    r'param_scheduler(\.\w+)?': 'PARAM_SCHEDULERS',
    r'\w+_evaluator(\.metrics)?': 'METRICS',
    r'default_hooks\.\w+|custom_hooks': 'HOOKS',
    r'visualizer': 'VISUALIZERS',
    r'visualizer\.vis_backends': 'VISBACKENDS',
    r'log_processor': 'LOG_PROCESSORS',
}
# Elsewhere a type may be anything, such as dict(type='nms'): it is refused if no
# registry has it and one has a close name.
GUESSES = {
    r'model\..+': ('MODELS', 'TASK_UTILS', 'WEIGHT_INITIALIZERS'),
    r'\w+_dataloader\..+\.pipeline\..+': ('TRANSFORMS',),
}
CUTOFF, GUESS_CUTOFF = 0.7, 0.85  # of difflib

LOWEST = {
    r'train_cfg\.(max_epochs|max_iters|val_interval)': 1,
    r'train_cfg\.val_begin': 0,
    r'\w+_dataloader\.(batch_size|prefetch_factor)': 1,
    r'\w+_dataloader\.num_workers': 0,
    r'optim_wrapper(\.\w+)?\.accumulative_counts': 1,
    r'default_hooks\.\w+\.interval': 1,
}
RATES = r'optim_wrapper(\.\w+)?\.optimizer\.(lr|weight_decay)'

# Necks and heads with an entry of in_channels for each map, and any derived ones.
MAP_FOR_EACH = {
    'ChannelMapper',
    'CSPNeXtPAFPN',
    'FPG',
    'FPN',
    'FPN_CARAFE',
    'HRFPN',
    'HRFuseScales',
    'ICNeck',
    'JPU',
    'MaskFormerHead',
    'MLANeck',
    'MultiLevelNeck',
    'NASFCOS_FPN',
    'NASFPN',
    'SSH',
    'YOLOXPAFPN',
}
# Heads that read the maps of in_index, by default the last one.
INDEXED = {'BaseDecodeHead', 'LinearClsHead'}
# Necks between which and the backbone's maps nothing changes but their size.
POOLING = {'GlobalAveragePooling'}
PYRAMID = 'SimplePyramid'  # what follows it gets four maps


class _Block(NamedTuple):
    """A dict in a config: its dotted place, and the scope it is built in."""

    place: str
    content: dict
    scope: str

    @property
    def pattern(self) -> str:
        """The place without the numbers of lists."""
        return re.sub(r'\.\d+\b', '', self.place)


def check_paths(config: str, checkpoint: str | None = None) -> None:
    """Looks at the names that a command got.

    Args:
        config: Where the path of a config belongs.
        checkpoint: Where a path or address of a checkpoint belongs.

    Raises:
        ConfigError: One is in the other's place.
    """
    swapped = checkpoint is not None and _ends(checkpoint, CONFIG_SUFFIXES)
    if _ends(config, CHECKPOINT_SUFFIXES):
        raise ConfigError(
            f'{config!r} is a checkpoint, and the config comes first: '
            + (
                f'give {checkpoint} {config}'
                if swapped
                else 'give the path of a config; to go on from a checkpoint add '
                '--resume CHECKPOINT, to start from its weights --cfg-options '
                'load_from=CHECKPOINT'
            )
        )
    if swapped:
        raise ConfigError(
            f'{checkpoint!r} is a config, and the second path is that of the '
            'checkpoint: give CONFIG CHECKPOINT'
        )


def _ends(path: str, suffixes: tuple[str, ...]) -> bool:
    return splitext(path)[1].lower() in suffixes


def check_config(cfg: Config, task: Literal['train', 'test']) -> None:
    """Looks for mistakes in what a run uses of a config. Nothing is built and no
    file is opened; what registers the named types is imported.

    Args:
        cfg: The whole config.
        task: ``'train'``: what trains and validates; ``'test'``: what tests.

    Raises:
        ConfigError: A section is missing, a top-level key or a type is unknown, a
            number is out of its range, or a neck or head does not fit the maps of
            a :class:`convnext_mm.ConvNeXt`. Names the dotted place.
    """
    _check_keys(cfg)
    for section in ('model', *NEEDED[task]):
        if cfg.get(section) is None:
            raise ConfigError(f'to {task} a config needs {section}; this one has none')
    scope = cfg.get('default_scope') or 'mmengine'
    blocks = [
        block
        for section in (*SECTIONS, *NEEDED[task], *OPTIONAL[task])
        for block in _blocks(cfg.get(section), section, scope)
    ]
    for check in (_check_numbers, _check_types, _check_backbone):
        for block in blocks:
            check(block)


def follow_backbone(cfg: Config) -> None:
    """Gives necks and heads the channels that their backbone, of this package,
    emits; for configs in which an option has just changed the backbone.

    Args:
        cfg: The whole config, changed in place. Each change is logged.

    Raises:
        ConfigError: The backbone cannot be built.
    """
    scope = cfg.get('default_scope') or 'mmengine'
    for block in list(_blocks(cfg.get('model'), 'model', scope)):
        for name, reader, setting, right in _misfits(block):
            if setting == 'in_index':
                continue  # which maps to read is not ours to say
            print_log(
                f'{name}.{setting}={right}, as {block.place}.backbone emits it '
                f'(not {reader[setting]})',
                logger='current',
            )
            reader[setting] = right


def _check_keys(cfg: Config) -> None:
    # The text of a config that imports its bases leaves them out.
    if 'read_base' in cfg.text:
        return
    for key in cfg:
        close = difflib.get_close_matches(key, KEYS, 1, KEY_CUTOFF)
        # A variable of the config's own is named where its value is used.
        if close and key not in KEYS and not _is_used(key, cfg.text):
            raise ConfigError(f'{key} has no effect: did you mean {close[0]}?')


def _is_used(name: str, text: str) -> bool:
    return re.search(rf'\b{re.escape(name)}\b(?!\s*=[^=])', text) is not None


def _blocks(node: Any, place: str, scope: str) -> Iterator[_Block]:
    if isinstance(node, dict):
        scope = node.get('_scope_', scope)
        yield _Block(place, node, scope)
        # What is below has the names of another library, Albumentations.
        is_foreign = _name(node.get('type')).startswith('Albu')
        children: Any = () if is_foreign else node.items()
    else:
        children = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, child in children:
        yield from _blocks(child, f'{place}.{key}', scope)


def _check_numbers(block: _Block) -> None:
    place, content, _ = block
    for key, value in content.items():
        pattern = f'{block.pattern}.{key}'
        lowest = _match(LOWEST, pattern)
        if lowest is not None and not (
            _is_count(value, lowest, exact='dataloader' in place)
            or (value == -1 and _name(content.get('type')).endswith('CheckpointHook'))
        ):
            raise ConfigError(
                f'{place}.{key} must be a whole number from {lowest} on, got {value!r}'
            )
        if re.fullmatch(RATES, pattern) and not _is_rate(value):
            raise ConfigError(
                f'{place}.{key} must be a number, finite and not below 0, got {value!r}'
            )
    if re.fullmatch(r'\w+_dataloader', place) and not content.get('num_workers'):
        for key in ('persistent_workers', 'prefetch_factor'):
            if content.get(key):
                raise ConfigError(
                    f'{place}.{key}={content[key]!r} needs data workers: set '
                    f'{place}.num_workers, or leave {key} out'
                )


def _is_count(value: Any, lowest: int, exact: bool) -> bool:
    """Whether it can count; what is no number and no text is left to others."""
    if isinstance(value, (bool, str)):
        return False
    if not isinstance(value, Real):
        return True
    # MMEngine's loops and hooks take 1e5, and infinity for never.
    whole = not exact and (float(value).is_integer() or math.isinf(value))
    return float(value) >= lowest and (whole or isinstance(value, Integral))


def _is_rate(value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return False
    return not isinstance(value, Real) or 0 <= float(value) < math.inf


def _match(patterns: dict[str, Any], place: str) -> Any:
    return next((v for p, v in patterns.items() if re.fullmatch(p, place)), None)


def _name(kind: Any) -> str:
    """A type as a config gives it, without its scope."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _check_types(block: _Block) -> None:
    place, content, scope = block
    kind = _match(REGISTRIES, block.pattern)
    if kind == 'METRICS' and 'metrics' in content:
        kind = 'EVALUATOR'
    if kind:
        _check_type(f'{place}.type', content.get('type'), (kind,), scope)
    else:
        kinds = _match(GUESSES, block.pattern) or ()
        _check_type(f'{place}.type', content.get('type'), kinds, scope, is_sure=False)
    if place == 'optim_wrapper':
        kinds = ('OPTIM_WRAPPER_CONSTRUCTORS',)
        _check_type(f'{place}.constructor', content.get('constructor'), kinds, scope)


def _check_type(
    place: str, name: Any, kinds: Sequence[str], scope: str, is_sure: bool = True
) -> None:
    """Raises where no registry has a name and, unless ``is_sure`` that one should,
    a registry has a close one."""
    if not isinstance(name, str) or any(_find(name, kind, scope) for kind in kinds):
        return
    close = [other for kind in kinds for other in _close(name, kind, scope, is_sure)]
    if not is_sure and not close:
        return
    library = name.rpartition('.')[0]
    if close:
        advice = f'did you mean {" or ".join(close)}?'
    elif library:
        advice = f'{library} has none of that name, or is not installed'
    else:
        advice = (
            'name the module of your own ones in custom_imports, and before those of '
            'another library its name, as in mmdet.FPN'
        )
    raise ConfigError(f'{place}={name!r} is unknown in the scope {scope!r}: {advice}')


def _find(name: str, kind: str, scope: str) -> Any:
    """What is built for a type, None if there is no such."""
    root: Registry = getattr(registries, kind)
    with root.switch_scope_and_registry(scope) as registry:
        try:
            return registry.get(name)
        except RuntimeError:  # of dotted names that lead nowhere
            return None


def _close(name: str, kind: str, scope: str, is_sure: bool) -> list[str]:
    """Known types of nearly this name, as a config would write them."""
    fold, cutoff = (str.lower, CUTOFF) if is_sure else (str, GUESS_CUTOFF)
    root: Registry = getattr(registries, kind)
    library, _, bare = name.rpartition('.')
    known: dict[str, str] = {}
    if not library:
        with root.switch_scope_and_registry(scope) as registry:
            while registry is not None:
                known = {**{fold(n): n for n in registry.module_dict}, **known}
                registry = registry.parent
    for child in root.children.values():
        if library in ('', child.scope):
            for other in child.module_dict:
                known.setdefault(fold(other), f'{child.scope}.{other}')
    return [known[n] for n in difflib.get_close_matches(fold(bare), known, 2, cutoff)]


def _class(settings: Any, scope: str) -> Any:
    kind = settings.get('type') if isinstance(settings, dict) else None
    return _find(kind, 'MODELS', scope) if isinstance(kind, str) else kind


def _check_backbone(block: _Block) -> None:
    """That what reads the maps of our backbone takes them."""
    _check_pooled(block)
    for name, reader, setting, right in _misfits(block):
        raise ConfigError(
            f'{name}.{setting}={reader.get(setting)} does not fit '
            f'{block.place}.backbone, which gives maps of {_out_channels(block)} '
            f'channels: it must be {right}'
        )


def _check_pooled(block: _Block) -> None:
    """That a classifier's head gets pooled features, as mmpretrain's own ConvNeXt
    gives them by default."""
    place, content, scope = block
    if content.get('neck') or not _out_channels(block):
        return
    takes_vectors = 'ClsHead' in _bases(_class(content.get('head'), scope))
    if takes_vectors and not content['backbone'].get('gap_before_final_norm'):
        raise ConfigError(
            f'{place}.head takes pooled features, and {place}.backbone gives maps: '
            'set gap_before_final_norm=True and out_indices=-1 in the backbone, which '
            "are the defaults of mmpretrain's ConvNeXt only"
        )


def _misfits(block: _Block) -> Iterator[tuple[str, dict, str, Any]]:
    """Place and settings of each reader of the maps, a setting that does not fit
    them, and what it must be. Who sets it right gets the next."""
    channels = _out_channels(block)
    for name, reader, given in _readers(block, channels) if channels else ():
        bases, seen = _bases(_class(reader, block.scope)), set()
        while (problem := _misfit(reader, bases, given)) and problem[0] not in seen:
            seen.add(problem[0])
            yield (name, reader, *problem)


def _out_channels(block: _Block) -> list[int]:
    """Of the maps that a backbone of this package emits; of others, none."""
    place, content, scope = block
    backbone: Any = content.get('backbone')
    kind = _class(backbone, scope)
    if not (isinstance(kind, type) and issubclass(kind, StagedBackbone)):
        return []
    known = inspect.signature(kind).parameters
    unknown = sorted(backbone.keys() - known.keys() - {'type', '_scope_'})
    if unknown and '**' not in str(inspect.signature(kind)):
        close = [
            difflib.get_close_matches(name, known, 1, KEY_CUTOFF) for name in unknown
        ]
        raise ConfigError(
            f'{place}.backbone has {", ".join(unknown)}, which {kind.__name__} does '
            'not take: '
            + (
                f'did you mean {", ".join(name for (name,) in close)}?'
                if all(close)
                else 'where a base config has another backbone, begin ours with '
                '_delete_=True'
            )
        )
    settings = {k: v for k, v in backbone.items() if k not in ('type', '_scope_')}
    try:
        with torch.device('meta'):
            return [*kind(**settings).out_channels]
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{place}.backbone: {error}') from error


def _bases(kind: Any) -> set[str]:
    return {base.__name__ for base in getattr(kind, '__mro__', ())}


def _readers(
    block: _Block, channels: list[int]
) -> Iterator[tuple[str, dict, list[int]]]:
    """Places and settings of what gets the maps of a backbone, its neck or the
    heads, and the channels of those maps."""
    place, content, scope = block
    neck: Any = content.get('neck')
    several = isinstance(neck, (list, tuple))
    for number, part in enumerate(neck if several else [neck]):
        bases = _bases(_class(part, scope))
        if not isinstance(part, dict) or bases & POOLING:
            break
        yield f'{place}.neck.{number}' if several else f'{place}.neck', part, channels
        if PYRAMID not in bases or len(channels) != 1:
            return
        channels = [*SimplePyramid.channels_of(channels[0])]
    for key, head in content.items():
        if not str(key).endswith('head'):
            continue
        if isinstance(head, dict):
            yield f'{place}.{key}', head, channels
        elif isinstance(head, (list, tuple)):  # a cascade
            for number, stage in enumerate(head):
                if isinstance(stage, dict):
                    yield f'{place}.{key}.{number}', stage, channels


def _misfit(
    reader: dict, bases: set[str], channels: list[int]
) -> tuple[str, Any] | None:
    """A setting of a neck or head that does not fit maps of these channels, and
    what it must be."""
    given: Any = reader.get('in_channels')
    index: Any = reader.get('in_index', -1)
    several = isinstance(given, (list, tuple))
    if PYRAMID in bases:
        fits = given in (channels[0], [channels[0]], (channels[0],))
        return None if fits else ('in_channels', channels[0])
    if bases & MAP_FOR_EACH:
        return ('in_channels', channels) if several and [*given] != channels else None
    if given is None or not bases & INDEXED:
        return None
    if several != isinstance(index, (list, tuple)):  # the head says so itself
        return None
    count = len(channels)
    for i in index if several else [index]:
        if i not in range(-count, count):
            return 'in_index', f'below {count}, for it counts the maps that are given'
    right = [channels[i] for i in index] if several else channels[index]
    if right != ([*given] if several else given):
        return 'in_channels', right
    if reader.get('c1_in_channels') not in (None, 0, channels[0]):
        return 'c1_in_channels', channels[0]
    return None
