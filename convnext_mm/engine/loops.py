"""MMEngine's training loops, which a resumed run enters where it was left."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.optim.scheduler import ReduceOnPlateauParamScheduler
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from torch import nn

from convnext_mm.registry import LOOPS

from .errors import ConfigError
from .positions import Position, seed_step
from .work_folder import VALIDATED


class _ResumableLoop:
    """What both loops add to MMEngine's.

    Each step draws by the seed, its number and its process, each sample by the
    seed and its position: no generator's state need be kept, and validation does
    not change training. A validation that was cut off comes first when a run
    resumes.
    """

    runner: Any
    dataloader: Any
    val_begin: int
    _decide_current_val_interval: Callable[[], None]
    val_interval: int
    _iter: int

    def __init__(self, runner: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(runner, dataloader, *args, **kwargs)  # type: ignore[call-arg]
        self.position = Position(self.dataloader, runner.seed)
        self.validated: int | None = None  # after which step

    def start_step(self) -> None:
        self.position.taken += 1
        seed_step(self.runner.seed, self._iter)

    def validate_if_due(self, done: int, end: int) -> None:
        """Validates after some of the epochs or iterations.

        Args:
            done, end: How many are over, and are to be.
        """
        if (
            self.runner.val_loop is None
            or done < max(self.val_begin, 1)
            or (done % self.val_interval and done != end)
        ):
            return
        self.runner.val_loop.run()
        self.validated = self._iter
        if is_main_process():
            # Behind a checkpoint that has its best score.
            mark = partial(_mark, self._marker, self._iter)
            self.runner.writer.afterwards(mark)

    def validate_if_cut_off(self, done: int, end: int) -> None:
        """Validates first, where a resumed run was left before or in a validation.

        Args:
            done, end: Of :meth:`validate_if_due`.
        """
        made = [self._marker.read_text() if self._marker.is_file() else '']
        broadcast_object_list(made)  # folders may differ
        schedulers: Any = self.runner.param_schedulers or ()
        if any(isinstance(s, ReduceOnPlateauParamScheduler) for s in schedulers):
            # What it learned from the validation is in a later checkpoint only.
            made = [str(self.runner.loaded_meta.get('validated'))]
        if made[0] != str(self._iter):
            self._decide_current_val_interval()
            self.validate_if_due(done, end)

    @property
    def _marker(self) -> Path:
        return Path(self.runner.work_dir, VALIDATED)


def _mark(marker: Path, step: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the validation would come again
        marker.write_text(str(step))


@LOOPS.register_module()
class EpochBasedTrainLoop(_ResumableLoop, MMEngineEpochBasedTrainLoop):
    """MMEngine's loop over epochs; resumes within one."""

    def run(self) -> nn.Module:
        """Trains."""
        self.runner.call_hook('before_train')
        if not self.position.taken:
            self.validate_if_cut_off(self._epoch, self._max_epochs)
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            self.validate_if_due(self._epoch, self._max_epochs)
        self.runner.call_hook('after_train')
        return self.runner.model

    def run_epoch(self) -> None:
        """Trains to the end of an epoch."""
        self.position.start_round(self._epoch, self.position.taken)
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for index, data_batch in enumerate(self.dataloader, self.position.taken):
            self.start_step()
            self.run_iter(index, data_batch)
        self.position.start_round(self._epoch + 1)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


@LOOPS.register_module()
class IterBasedTrainLoop(_ResumableLoop, MMEngineIterBasedTrainLoop):
    """MMEngine's loop over iterations; resumes at its sample, without loading
    those before."""

    def run(self) -> nn.Module:
        """Trains."""
        self.runner.call_hook('before_train')
        # In iteration-based training everything is one epoch.
        self.runner.call_hook('before_train_epoch')
        self.validate_if_cut_off(self._iter, self._max_iters)
        data_batches = self._data_batches()
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            data_batch = next(data_batches)
            self.start_step()
            self.run_iter(data_batch)
            self._decide_current_val_interval()
            self.validate_if_due(self._iter, self._max_iters)
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def _data_batches(self) -> Iterator[Sequence[dict]]:
        """Batches without end, through as many rounds of the sampler."""
        self.position.start_round(self.position.round, self.position.taken)
        while True:
            yield from self.dataloader
            if not self.position.taken:
                raise ConfigError(
                    'train_dataloader gives no batch: with drop_last=True it needs '
                    f'at least {self.position.batch_size} images for each process; '
                    'set batch_size lower, or drop_last=False'
                )
            self.position.start_round(self.position.round + 1)
