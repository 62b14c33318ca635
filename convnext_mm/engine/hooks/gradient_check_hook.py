"""A hook that names the parameters which the first step gave no gradient."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from convnext_mm.engine.errors import UnusedParametersError
from convnext_mm.models import StagedBackbone
from convnext_mm.registry import HOOKS

NAMED = 5  # parameters in a message


@HOOKS.register_module()
class GradientCheckHook(Hook):
    """After the first optimizer step, names the parameters that are to be trained
    and that no backward pass reached: above all the norm of a map of
    :class:`convnext_mm.ConvNeXt` that neither neck nor head reads.

    One process warns. With ``DistributedDataParallel``, which waits for every
    gradient, each process that finds one stops, before PyTorch does in the next
    step; with ``find_unused_parameters`` or ``static_graph`` it warns. Models in
    other wrappers, and those with several optimizers, are not looked at.
    """

    priority = 'VERY_HIGH'  # before anything of this step is logged or saved

    def __init__(self) -> None:
        self._is_new = True
        self._missing: dict[nn.Parameter, str] = {}
        self._handles: list[RemovableHandle] = []

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """In the first step, begins to watch."""
        if not self._is_new:
            return
        self._is_new = False
        model, optim_wrapper = runner.model, runner.optim_wrapper
        if (
            is_model_wrapper(model) and not isinstance(model, DistributedDataParallel)
        ) or (
            not isinstance(optim_wrapper, OptimWrapper)
            or isinstance(optim_wrapper, OptimWrapperDict)
        ):
            return
        self._missing = {
            param: name
            for name, param in _unwrapped(model).named_parameters()
            if param.requires_grad
        }
        # Gradients are gone when the step is over, also those of a step that the
        # loss scale skipped.
        self._handles = [
            param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._note
            )
            for param in self._missing
        ]

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """After the first optimizer step, speaks and watches no longer.

        Raises:
            UnusedParametersError: Processes train together, and a parameter has no
                gradient.
        """
        if not self._handles or not runner.optim_wrapper.should_update():
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        missing, self._missing = self._missing, {}
        if not missing:
            return
        model = runner.model
        message = f'parameters without gradient: {explain(_unwrapped(model), missing)}'
        if not isinstance(model, DistributedDataParallel):
            runner.logger.warning(
                f'{message} (several processes cannot train like this)'
            )
        elif model.find_unused_parameters or model.static_graph:
            runner.logger.warning(message)
        else:
            raise UnusedParametersError(
                f'{message}; or set find_unused_parameters=True, which makes every '
                'step slower'
            )

    def _note(self, param: nn.Parameter) -> None:
        self._missing.pop(param, None)


def _unwrapped(model: nn.Module) -> Any:
    return model.module if is_model_wrapper(model) else model


def explain(model: nn.Module, missing: dict[nn.Parameter, str]) -> str:
    """What to do about parameters without gradient, in a sentence.

    Args:
        model: The whole model, not wrapped.
        missing: The parameters, and their names in it.
    """
    missing, sentences = dict(missing), []
    for name, backbone in model.named_modules():
        if not isinstance(backbone, StagedBackbone):
            continue
        parts = {
            i: getattr(backbone, f'norm{i}', backbone.stages[i])
            for i in backbone.out_indices
        }
        unread = [i for i, p in parts.items() if missing.keys() >= {*p.parameters()}]
        if not 0 < len(unread) < len(parts):
            continue
        for i in unread:
            # Of the last one, the stage as well.
            for part in (parts[i], backbone.stages[i], backbone.downsample_layers[i]):
                for param in part.parameters():
                    missing.pop(param, None)
        prefix = f'{name}.' if name else ''
        kept = [k for k, i in enumerate(parts) if i not in unread]
        stages = tuple(i for i in parts if i not in unread)
        whole = model.get_submodule(name.rpartition('.')[0])
        changes = [
            f'{prefix}out_indices={stages}',
            *(
                change
                for reader, module in _readers(whole)
                for change in _changes(reader, module, kept, len(parts))
            ),
        ]
        norms = ', '.join(f'{prefix}norm{i}' for i in unread)
        sentences.append(
            f'{norms}: {"its map is" if len(unread) == 1 else "their maps are"} not '
            f'read; set {_list(changes)}'
        )
    if missing:
        names = list(missing.values())
        names[NAMED:] = [f'{len(names) - NAMED} more'] if len(names) > NAMED else []
        sentences.append(
            f'{_list(names)}: they have no part in the loss; leave out what holds '
            'them, or freeze them with requires_grad=False'
        )
    return '; '.join(sentences)


def _list(items: list[str]) -> str:
    *others, last = items
    return f'{", ".join(others)} and {last}' if others else last


def _readers(whole: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What gets the maps of a detector's or segmentor's backbone: the neck, or
    the heads."""
    neck = getattr(whole, 'neck', None)
    children = whole.named_children() if neck is None else [('neck', neck)]
    for name, child in children:
        if isinstance(child, nn.Sequential):
            yield f'{name}.0', child[0]
        elif isinstance(child, nn.ModuleList):
            yield from ((f'{name}.{i}', head) for i, head in enumerate(child))
        else:
            yield name, child


def _changes(name: str, reader: Any, kept: Sequence[int], count: int) -> Iterator[str]:
    """Settings by which a neck or head takes ``kept`` of ``count`` maps as it took
    all."""
    index = getattr(reader, 'in_index', None)
    if index is not None:
        several = isinstance(index, Sequence)
        old = list(index) if several else [index]
        if not {i % count for i in old} <= {*kept}:
            return
        # A negative one counts from the end, before and after.
        new = [kept.index(i % count) - (len(kept) if i < 0 else 0) for i in old]
        if new != old:
            yield f'{name}.in_index={new if several else new[0]}'
        return
    channels = getattr(reader, 'in_channels', None)
    if not isinstance(channels, Sequence) or len(channels) != count:
        return
    yield f'{name}.in_channels={[channels[k] for k in kept]}'
    start, end = getattr(reader, 'start_level', 0), getattr(reader, 'end_level', -1)
    first = sum(k < start for k in kept)
    if first != start:
        yield f'{name}.start_level={first}'
    last = sum(k <= end for k in kept) - 1
    if end >= 0 and last != end:
        yield f'{name}.end_level={last}'
