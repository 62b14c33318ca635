"""Each layer's learning rate, over the whole schedule."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, init_default_scope
from torch import nn
from torch.optim import Optimizer

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis.quiet import quiet
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.datasets.errors import DataError
from convnext_mm.engine.errors import ConfigError

from .output import GRID, save

POINTS = 500  # of a curve
# What an epoch has where its length decides nothing.
NOMINAL_EPOCH = 100
# A part of the schedule that is shorter gets a picture of its own.
SHORT_WARMUP = 0.1
# Training images by what a config says of them: (type, file or split).
PUBLISHED_IMAGES = {
    # Without the images that have no object, as filter_empty_gt has it.
    ('CocoDataset', 'annotations/instances_train2017.json'): 117_266,
    ('ImageNet', 'train'): 1_281_167,
}


class LayerGroup(NamedTuple):
    """Layers that train at one learning rate.

    Attributes:
        name: ``'layer 3'``, by layer id, where the constructor gives ids.
        layers: What it holds: ``'stage 3 blocks 1-3, downsampling 3'``.
        params: Number of parameters.
        scale: Its learning rate over ``optimizer.lr``.
        start, peak, end: Learning rate of the first iteration, the highest, and that
            of the last.
        rates: Learning rates in the iterations :attr:`Schedule.iterations`.
    """

    name: str
    layers: str
    params: int
    scale: float
    start: float
    peak: float
    end: float
    rates: np.ndarray


class Schedule(NamedTuple):
    """Learning rates of a whole training.

    Attributes:
        groups: From the smallest learning rate to the largest.
        iterations: Those looked at, ascending, from 0.
        num_iterations: Of the whole training.
        epoch_length: Iterations in an epoch; None where training counts iterations.
        epochs_only: The epoch's length is not known and decides nothing:
            iterations stand for hundredths of an epoch.
    """

    groups: list[LayerGroup]
    iterations: np.ndarray
    num_iterations: int
    epoch_length: int | None
    epochs_only: bool


def schedule_of(cfg: Config, epoch_length: int | None = None) -> Schedule:
    """Builds a config's optimizer with its own constructor, for a model without
    memory, and steps its schedulers through the whole training.

    Args:
        cfg: The whole config. ``auto_scale_lr`` is not applied.
        epoch_length: Iterations in an epoch. By default counted: from the data set
            where it is there, else from the known size of COCO or ImageNet; the number
            of processes is that of ``auto_scale_lr.base_batch_size``, else 1. Where
            neither is known and all schedulers count epochs, nothing depends on it.

    Raises:
        ConfigError: The config does not train, or its epoch's length is needed and
            not known.
    """
    settings: Any = cfg.get('train_cfg') or {}
    by_iter = settings.get('max_iters') is not None
    length = settings.get('max_iters' if by_iter else 'max_epochs')
    if not length or not cfg.get('optim_wrapper'):
        raise ConfigError(
            'a learning rate needs optim_wrapper and train_cfg with max_epochs or '
            'max_iters: give the config of a training'
        )
    specs = _schedulers(cfg)
    needs_epochs = not by_iter or any('convert_to_iter_based' in s for s in specs)
    epochs_only = False
    if needs_epochs and epoch_length is None:
        epoch_length = count_epoch(cfg)
        if epoch_length is None:
            epoch_length = _nominal_epoch(specs, by_iter)
            epochs_only = True
    with quiet():
        model = build_model(cfg)
        optimizer = optimizer_of(cfg, model)
    members = _by_rate(optimizer, model)
    num_iterations = int(length) if by_iter else int(length) * (epoch_length or 1)
    rates = _step(specs, [*members], num_iterations, epoch_length or 1, not by_iter)
    iterations = _sample(rates)
    base = cfg.optim_wrapper.optimizer.get('lr') or max(members)
    groups = [
        LayerGroup(
            name=member.name,
            layers=member.layers,
            params=member.params,
            scale=rate / base,
            start=float(rates[0, i]),
            peak=float(rates[:, i].max()),
            end=float(rates[-1, i]),
            rates=rates[iterations, i],
        )
        for i, (rate, member) in enumerate(members.items())
    ]
    return Schedule(
        groups,
        iterations,
        num_iterations,
        None if by_iter else epoch_length,
        epochs_only,
    )


def optimizer_of(cfg: Config, model: nn.Module) -> Optimizer:
    """The optimizer of a config, with the parameter groups of its constructor.

    Args:
        cfg: The whole config.
        model: From :func:`convnext_mm.analysis.complexity.build_model`.

    Raises:
        ConfigError: ``optim_wrapper`` has no single optimizer, or a wrong setting.
    """
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    given = copy.deepcopy(cfg.optim_wrapper)
    if 'optimizer' not in given:
        raise ConfigError(
            'optim_wrapper.optimizer is missing: learning rates are shown of a config '
            'with one optimizer'
        )
    # How a step is computed decides no learning rate, and may need a GPU.
    given.optimizer.pop('fused', None)
    kept = ('constructor', 'optimizer', 'paramwise_cfg')
    settings = {key: given[key] for key in kept if key in given}
    try:
        wrapper = build_optim_wrapper(model, dict(settings, type='OptimWrapper'))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f'optim_wrapper: {error}') from error
    return wrapper.optimizer


def count_epoch(cfg: Config) -> int | None:
    """Iterations in an epoch of a config's training, as
    :func:`schedule_of` counts them; None where no size is known."""
    loader: Any = cfg.get('train_dataloader') or {}
    dataset = loader.get('dataset')
    if not dataset:
        return None
    try:
        check_data(cfg, ['train_dataloader'])
    except DataError:
        images = _published_images(dataset)
    else:
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        images = len(DATASETS.build(copy.deepcopy(dataset)))
    if images is None:
        return None
    batch = loader.get('batch_size', 1)
    total = (cfg.get('auto_scale_lr') or {}).get('base_batch_size', batch)
    of_a_process = -(-images // max(1, total // batch))
    last = 0 if loader.get('drop_last') else batch - 1
    return max(1, (of_a_process + last) // batch)


def _published_images(dataset: Any) -> int | None:
    kind = str(dataset.get('type')).rpartition('.')[2]
    key = (kind, dataset.get('ann_file') or dataset.get('split'))
    is_own = 'classes' in (dataset.get('metainfo') or {})
    if kind == 'CocoDataset':
        is_own |= not (dataset.get('filter_cfg') or {}).get('filter_empty_gt')
    return None if is_own else PUBLISHED_IMAGES.get(key)


def _schedulers(cfg: Config) -> list[Any]:
    given: Any = cfg.get('param_scheduler') or []
    return [given] if 'type' in given else [*given]


def _nominal_epoch(specs: Sequence[Any], by_iter: bool) -> int:
    if by_iter or any(not spec.get('by_epoch', True) for spec in specs):
        raise ConfigError(
            'the schedule counts epochs and iterations, and the training data is not '
            'there to say how many iterations an epoch has: give --epoch-length N, or '
            '--data-root DIR'
        )
    return NOMINAL_EPOCH


class _Members(NamedTuple):
    name: str
    layers: str
    params: int


def _by_rate(optimizer: Optimizer, model: nn.Module) -> dict[float, _Members]:
    """Initial learning rate, ascending, to what has it."""
    names = {id(param): name for name, param in model.named_parameters()}
    by_rate: dict[float, list[dict]] = {}
    for group in optimizer.param_groups:
        by_rate.setdefault(float(group['lr']), []).append(group)
    found = {}
    for rate, groups in sorted(by_rate.items()):
        ids = sorted({i for group in groups if (i := layer_id(group)) is not None})
        held = [p for group in groups for p in group['params']]
        found[rate] = _Members(
            name=f'layer{"s" * (len(ids) > 1)} {ranges(ids)}'
            if ids
            else f'lr {rate:g}',
            layers=(
                'all layers'
                if len(by_rate) == 1
                else summarise((names[id(p)] for p in held), names.values())
            ),
            params=sum(p.numel() for p in held),
        )
    return found


def layer_id(group: dict) -> int | None:
    """That of a parameter group whose constructor names groups by it: ours, mmdet's
    and mmseg's."""
    match = re.match(r'layer_(\d+)_', str(group.get('group_name')))
    return int(match[1]) if match else None


def layer_of(name: str) -> tuple[str, int | None]:
    """The layer of a parameter, and its block's number from 1 on: ``('stage 3', 2)``,
    ``('stem', None)``, ``('neck', None)``.

    Args:
        name: In the whole model: ``'backbone.stages.2.1.norm.weight'``.
    """
    match = re.match(r'backbone\.(downsample_layers|stages)\.(\d+)\.(\d+)', name)
    if match is None:
        is_norm = re.match(r'backbone\.norm\d\.', name)
        return ('output norms' if is_norm else name.partition('.')[0]), None
    stage = int(match[2]) + 1
    if match[1] == 'downsample_layers':
        return ('stem' if stage == 1 else f'downsampling {stage}'), None
    return f'stage {stage}', int(match[3]) + 1


def summarise(names: Iterable[str], all_names: Iterable[str]) -> str:
    """The layers of parameters, blocks with their numbers where a stage is not
    there as a whole: ``'downsampling 3, stage 3 blocks 1-3'``."""
    blocks, of_stage = _blocks(names), _blocks(all_names)
    return ', '.join(
        layer
        if found == of_stage[layer]
        else f'{layer} block{"s" * (len(found) > 1)} {ranges(sorted(found))}'
        for layer, found in blocks.items()
    )


def _blocks(names: Iterable[str]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for name in names:
        layer, block = layer_of(name)
        found.setdefault(layer, set()).update(() if block is None else (block,))
    return found


def ranges(numbers: Sequence[int]) -> str:
    """``'1-3, 7'`` for 1, 2, 3, 7."""
    return ', '.join(
        str(first) if first == last else f'{first}-{last}'
        for first, last in _runs(numbers)
    )


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1]
            start = i


def _step(
    specs: Sequence[Any],
    initial: Sequence[float],
    num_iterations: int,
    epoch_length: int,
    has_epochs: bool,
) -> np.ndarray:
    """(num_iterations, groups): the learning rates of each iteration, from MMEngine's
    schedulers in the order in which its hook steps them."""
    optimizer = torch.optim.SGD(
        [dict(params=[nn.Parameter(torch.zeros(()))], lr=lr) for lr in initial]
    )
    ends = (num_iterations, num_iterations // epoch_length)
    try:
        schedulers = [
            PARAM_SCHEDULERS.build(
                # As the runner sets it where a config does not.
                {'end': ends[spec.get('by_epoch', True)], **copy.deepcopy(spec)},
                default_args=dict(optimizer=optimizer, epoch_length=epoch_length),
            )
            for spec in specs
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f'param_scheduler: {error}') from error
    by_iter = [s for s in schedulers if not s.by_epoch]
    by_epoch = [s for s in schedulers if s.by_epoch and has_epochs]
    rates = np.empty((num_iterations, len(initial)))
    with warnings.catch_warnings():
        # The weights that the optimizer would update are not there.
        warnings.filterwarnings('ignore', '.*optimizer.step')
        for iteration in range(num_iterations):
            rates[iteration] = [group['lr'] for group in optimizer.param_groups]
            for scheduler in by_iter:
                scheduler.step()
            if (iteration + 1) % epoch_length == 0:
                for scheduler in by_epoch:
                    scheduler.step()
    return rates


def _sample(rates: np.ndarray) -> np.ndarray:
    """Iterations to draw: some of all, and some of a warm-up."""
    last, peak = len(rates) - 1, int(rates[:, -1].argmax())
    return np.unique(
        np.concatenate(
            [
                np.linspace(0, end, POINTS).astype(int)
                for end in (last, min(last, 2 * peak))
            ]
        )
    )


def draw_schedule(schedule: Schedule, path: Path, title: str = '') -> Path:
    """Draws the learning rate of each group, and a short warm-up once more.

    Args:
        schedule: From :func:`schedule_of`.
        path: PNG to write.
        title: Over it.

    Raises:
        ConfigError: It cannot be written there.
    """
    groups, iterations = schedule.groups, schedule.iterations
    peak = int(iterations[groups[-1].rates.argmax()])
    has_zoom = 0 < peak < SHORT_WARMUP * schedule.num_iterations
    figure = Figure(figsize=(14 if has_zoom else 11, 4.6), layout='constrained')
    axes = figure.subplots(
        1, 1 + has_zoom, squeeze=False, width_ratios=[1, 2] if has_zoom else None
    )[0]
    unit = schedule.epoch_length or 1
    # A warm-up is counted in iterations, where an epoch's are known.
    units = [1 if has_zoom and not schedule.epochs_only else unit, unit][-len(axes) :]
    colours = colormaps['viridis'](np.linspace(0, 0.92, len(groups)))
    for axis, unit in zip(axes, units):
        for group, colour in zip(groups, colours):
            axis.plot(iterations / unit, group.rates, color=colour)
        axis.grid(color=GRID)
        axis.spines[['top', 'right']].set_visible(False)
        axis.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
        axis.set(
            xlabel='iteration' if unit == 1 else 'epoch',
            xlim=(0, schedule.num_iterations / unit),
            ylim=(0, None),
        )
    axes[0].set_ylabel('learning rate')
    axes[-1].set_title('whole training')
    if has_zoom:
        axes[0].set(title='warm-up', xlim=(0, 2 * peak / units[0]))
    figure.legend(
        axes[0].lines[::-1],
        [f'{group.name}\n  {shorten(group.layers)}' for group in groups[::-1]],
        fontsize=8,
        loc='outside right upper',
        frameon=False,
    )
    figure.suptitle(title)
    return save(figure, path)


def shorten(text: str, width: int = 40) -> str:
    """The text, or its beginning and three dots."""
    return text if len(text) <= width else f'{text[: width - 3].rstrip(", ")}...'
