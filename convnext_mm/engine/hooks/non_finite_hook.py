"""Steps whose gradients are not finite do not reach the weights."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement
from torch import Tensor

from convnext_mm import private_names
from convnext_mm.checkpoint.errors import CheckpointWriteError
from convnext_mm.checkpoint.write import write_checkpoint
from convnext_mm.engine.errors import ConfigError, TrainingError
from convnext_mm.engine.loops import IterBasedTrainLoop
from convnext_mm.engine.work_folder import checkpoints
from convnext_mm.registry import HOOKS

SHOWN_IMAGES = 4


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Skips, counts and names steps with a NaN or infinity, and stops training
    where they do not end.

    The gradients' norm decides, which all processes have in common; where MMEngine
    clips by it, it is not computed again. With a loss scale (float16) only a step
    whose loss is not finite counts: others are how the scale is found. Statistics
    of batch norm are taken back. Weights are looked at before they are saved.

    Args:
        limit: So many skipped steps in a row stop training; the batch and what its
            randomness was drawn from is written to
            ``nonfinite_iter_N_rank_R.pth`` in the work folder.
        rollbacks: So often training goes on from the last checkpoint instead, with
            the data that comes next.

    Raises:
        TrainingError: The limit is reached, or weights to save are not finite.
    """

    priority = 'VERY_HIGH'

    def __init__(self, limit: int = 20, rollbacks: int = 0) -> None:
        if limit < 1 or rollbacks < 0:
            raise ConfigError(
                f'NonFiniteHook takes limit from 1 on and rollbacks from 0 on, got '
                f'limit={limit}, rollbacks={rollbacks}'
            )
        self.limit = limit
        self.rollbacks = rollbacks
        self._goes_back = False
        self._norm = 0.0  # of the last step's gradients; NaN or infinite: skipped
        self._seen: list[tuple[Any, Any]] = []  # batches and losses since a step
        self._buffers: list[Tensor] = []
        self._kept: list[Tensor] = []

    def before_train(self, runner: Any) -> None:
        """Puts itself before the optimizer."""
        if self.rollbacks and not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ConfigError(
                'NonFiniteHook(rollbacks=...) needs train_cfg.type='
                "'IterBasedTrainLoop': an epoch cannot go on with other data"
            )
        for wrapper in _wrappers(runner.optim_wrapper):
            wrapper.optimizer.step = self._guarded(wrapper, wrapper.optimizer.step)
        self._buffers = [
            buffer
            for module in runner.model.modules()
            if getattr(module, 'track_running_stats', False)
            for buffer in module.buffers()
        ]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Goes back, where that is due, and keeps what a forward pass changes."""
        if self._goes_back:
            self._goes_back = False
            runner.roll_back()
        self._norm = 0.0
        self._scale = _scale(runner.optim_wrapper)
        if not self._seen:  # of the first of the batches that make a step
            _copy(self._kept, self._buffers)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Counts and names a skipped step.

        Raises:
            TrainingError: There were too many in a row.
        """
        self._seen.append((data_batch, outputs))
        if not has_stepped(runner.optim_wrapper):
            return
        seen, self._seen = self._seen, []
        shrunk = _scale(runner.optim_wrapper) < self._scale
        if math.isfinite(self._norm) and not shrunk:
            runner.skipped_in_a_row = 0
            return
        found = [_describe(batch, losses) for batch, losses in seen]
        guilty = [
            f'{", ".join(names)} in process {rank}, images {", ".join(images)}'
            for rank, batches in enumerate(all_gather_object(found))
            for names, images in batches
            if names
        ]
        if shrunk and not guilty:
            return
        _copy(self._buffers, self._kept)
        runner.skipped_in_a_row += 1
        total = runner.message_hub.runtime_info.get('skipped_steps', 0) + 1
        runner.message_hub.update_info('skipped_steps', total)
        what = (
            f'{"; ".join(guilty)}'
            if guilty
            else f'the norm of the gradients is {self._norm}, all losses are finite'
        )
        step = runner.iter + 1
        runner.logger.warning(
            f'Step {step} is skipped: not finite: {what} ({runner.skipped_in_a_row} '
            f'in a row, {total} in all).'
        )
        if runner.skipped_in_a_row >= self.limit:
            self._end(runner, step, what, seen)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Looks at weights before they replace good ones.

        Raises:
            TrainingError: They are not finite.
        """
        for name, value in checkpoint['state_dict'].items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise TrainingError(
                    f'{name} is not finite after step {runner.iter + 1}, though its '
                    f'gradients were: nothing was saved, {_last(runner)}; a smaller '
                    'learning rate helps, or clip_grad'
                )

    def _guarded(self, wrapper: Any, step: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if _scale(wrapper):  # the scaler skips
                return step(*args, **kwargs)
            norm = _clipped_norm(wrapper)
            if norm is None:
                norm = gradient_norm(wrapper.optimizer)
            if math.isfinite(norm):
                return step(*args, **kwargs)
            self._norm = norm
            return None

        return guarded

    def _end(self, runner: Any, step: int, what: str, seen: list) -> None:
        path = Path(runner.work_dir, f'nonfinite_iter_{step}_rank_{get_rank()}.pth')
        evidence = dict(
            seed=runner.seed,
            iteration=step - 1,
            rank=get_rank(),
            batches=[_plain(batch) for batch, _ in seen],
            losses=[_plain(losses) for _, losses in seen],
        )
        try:
            write_checkpoint(evidence, path)
        except CheckpointWriteError as error:
            runner.logger.warning(str(error))
        if self.rollbacks and checkpoints(runner.checkpoint_folder):
            self.rollbacks -= 1
            self._goes_back = True  # when this step's schedules are over
            return
        raise TrainingError(
            f'{self.limit} steps in a row were not finite, the last is step {step} '
            f'({what}): training stops, {_last(runner)}, and the batch is in '
            f'{path.name}; a smaller learning rate helps, clip_grad, or '
            'NonFiniteHook(rollbacks=...)'
        )


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """The 2-norm of all gradients of an optimizer; NaN or infinite where one is."""
    grads = [
        param.grad
        for group in optimizer.param_groups
        for param in group['params']
        if param.grad is not None
    ]
    if not grads:
        return 0.0
    if private_names.has('torch._foreach_norm'):
        norms = list(torch._foreach_norm(grads))
    else:
        norms = [grad.norm() for grad in grads]
    device = norms[0].device
    norm = torch.stack([norm.to(device) for norm in norms]).norm()
    # Of shards, the part of this process.
    return float(norm.full_tensor() if hasattr(norm, 'full_tensor') else norm)


def _wrappers(wrapper: Any) -> Iterator[Any]:
    """The wrappers of a model with several optimizers, or the one."""
    if hasattr(wrapper, 'optim_wrappers'):
        yield from wrapper.optim_wrappers.values()
    else:
        yield wrapper


def has_stepped(wrapper: Any) -> bool:
    """Whether the last step used its gradients, and none are pending."""
    return all(w.should_update() for w in _wrappers(wrapper))


def _scale(wrapper: Any) -> float:
    """The loss scale; 0 without one."""
    scalers = [getattr(w, 'loss_scaler', None) for w in _wrappers(wrapper)]
    return sum(s.get_scale() for s in scalers if s is not None and s.is_enabled())


def _clipped_norm(wrapper: Any) -> float | None:
    """What MMEngine computed just now to clip; None where it does not."""
    if not wrapper.clip_grad_kwargs or wrapper.grad_name != 'grad_norm':
        return None
    return float(wrapper.message_hub.get_scalar('train/grad_norm').current())


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    if to and private_names.has('torch._foreach_copy_'):
        torch._foreach_copy_(to, source)
        return
    for kept, tensor in zip(to, source):
        kept.copy_(tensor)


def _describe(batch: Any, losses: Any) -> tuple[list[str], list[str]]:
    """Losses that are not finite, with their values, and the images of a batch."""
    names = [
        f'{name} is {float(value)}'
        for name, value in (losses or {}).items()
        if isinstance(value, (Tensor, float)) and not math.isfinite(float(value))
    ]
    images = [
        str(path)
        for sample in (batch.get('data_samples') if isinstance(batch, dict) else ())
        or ()
        if (path := getattr(sample, 'img_path', None)) is not None
    ]
    more = len(images) - SHOWN_IMAGES
    if more > 0:
        images[SHOWN_IMAGES:] = [f'{more} more']
    return names, images or ['without names']


def _plain(value: Any) -> Any:
    """Tensors and plain data, which any program reads."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, BaseDataElement):
        return {k: _plain(v) for k, v in (*value.metainfo_items(), *value.items())}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, 'to_tensor'):  # masks of MMDetection
        return value.to_tensor(torch.uint8, 'cpu')
    return str(value)


def _last(runner: Any) -> str:
    found = checkpoints(runner.checkpoint_folder)
    return (
        f'the last good checkpoint is {found[0]}' if found else 'there is none before'
    )
