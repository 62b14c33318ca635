"""Saving that no fault of a disk or a machine turns into a loss."""

import contextlib
import copy
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EMAHook

from convnext_mm.checkpoint.errors import CheckpointWriteError
from convnext_mm.checkpoint.write import write_text
from convnext_mm.engine.agreement import Agreement, Interrupted, StopSignals
from convnext_mm.engine.work_folder import (
    AUTOSAVE,
    INTERRUPTED,
    POINTER,
    checkpoints,
    progress,
)
from convnext_mm.registry import HOOKS

from .non_finite_hook import has_stepped

RETRY_SECONDS = 60


class _RemovesLater:
    """A file backend that keeps in mind what it is to remove until it may."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._doomed: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._doomed.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._doomed.append((self._backend.rmtree, path))

    def take(self, best: bool) -> list[tuple[Callable[[str], None], str]]:
        taken = [entry for entry in self._doomed if _is_best(entry[1]) is best]
        self._doomed = [entry for entry in self._doomed if entry not in taken]
        return taken


def _is_best(path: str) -> bool:
    return os.path.basename(path).startswith('best_')


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's, which loses nothing.

    A checkpoint is written beside its place by a thread that has a copy, verified
    and moved there; only then the pointer to it changes and an older one goes.
    Besides those of ``interval`` there is one every few minutes,
    ``autosave_iter_N.pth``, of which the newest is kept. On SIGTERM, SIGUSR1 and
    SIGINT all processes save at the end of the same step and exit with status 75.
    With gradient accumulation a checkpoint waits until the weights change. While
    steps are skipped (see :class:`.NonFiniteHook`) it waits too, and nothing is
    deleted.

    Where a disk refuses, that is a warning; training goes on and tries again every
    minute.

    Args:
        autosave_minutes: Longest time between two checkpoints of any kind; None:
            only those of ``interval``.
        give_up_minutes: Ends the run when so long nothing could be saved.
        **kwargs: MMEngine's.

    Raises:
        CheckpointWriteError: Nothing could be saved for ``give_up_minutes``.
        Interrupted: A signal ended the run.
    """

    def __init__(
        self,
        *args: Any,
        autosave_minutes: float | None = 15,
        give_up_minutes: float = 60,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.autosave_seconds = 60 * (autosave_minutes or float('inf'))
        self.give_up_seconds = 60 * give_up_minutes
        self._signals: StopSignals | None = None
        self._stopping = 0  # the signal
        self.file_backend: Any = None
        self._due: tuple[int, dict[str, int]] | None = None  # step, meta
        self._wrote_at = -2  # iteration
        self._doomed: list[tuple[Callable[[str], None], str]] = []
        self._failing_since: float | None = None
        self._saved_at = self._tried_at = time.monotonic()

    def before_train(self, runner: Any) -> None:
        """Starts to listen to signals."""
        super().before_train(runner)
        self.file_backend = _RemovesLater(self.file_backend)
        self._signals = StopSignals()
        self._agreement = Agreement(2)
        self._saved_at = self._tried_at = time.monotonic()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Saves where it is time to."""
        if self._signals is None:
            return
        is_last = self.is_last_train_iter(runner)
        if not self.by_epoch and (
            self.every_n_train_iters(runner, self.interval, self.save_begin)
            or (self.save_last and is_last)
        ):
            self._due = runner.iter + 1, dict(epoch=runner.epoch)
        autosave, stop = self._agreement.exchange(
            [self._is_time(), self._signals.received]
        )
        self._stopping = self._stopping or stop
        self._try(runner, runner.writer.check)
        if not has_stepped(runner.optim_wrapper):
            return  # gradients are pending, which no checkpoint has
        done = runner.iter + 1
        # What was agreed is what was due a step ago.
        autosave = autosave and runner.iter > self._wrote_at + 1
        if self._due and (is_last or self._stopping or not runner.skipped_in_a_row):
            step, meta = self._due
            self._save_checkpoint_with_step(
                runner, step if self.by_epoch else done, dict(meta, iter=done)
            )
        elif self._stopping or (autosave and not runner.skipped_in_a_row):
            self._autosave(runner, runner.epoch, done)
        if self._stopping:
            self._stop(runner, done)

    def after_train_epoch(self, runner: Any) -> None:
        """Saves where it is time to."""
        if self.by_epoch and (
            self.every_n_epochs(runner, self.interval, self.save_begin)
            or (self.save_last and self.is_last_train_epoch(runner))
        ):
            step = runner.epoch + 1
            self._save_checkpoint_with_step(
                runner, step, dict(epoch=step, iter=runner.iter)
            )

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence | None = None,
    ) -> None:
        """A signal cuts validation off; it comes again when the run resumes. Who is
        how far in it nobody knows, so the process that saves decides."""
        if self._signals is None or not self._signals.received:
            return
        if is_main_process() and not runner.saves_together:
            self._stopping = self._signals.received
            averaged = any(isinstance(hook, EMAHook) for hook in runner.hooks)
            # Averages stand where the weights are, until the validation is over.
            if has_stepped(runner.optim_wrapper) and not averaged:
                self._autosave(runner, runner.epoch, runner.iter)
            self._stop(runner, runner.iter, alone=True)

    def after_train(self, runner: Any) -> None:
        """Waits until everything is written, however long a full disk takes."""
        self._try(runner, runner.writer.wait)
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        name = self.filename_tmpl.format(meta['epoch' if self.by_epoch else 'iter'])
        while self._is_failing(runner):
            time.sleep(min(RETRY_SECONDS, self.give_up_seconds))
            self._write(runner, name, meta)
            self._try(runner, runner.writer.wait)
        self._agreement.finish()
        self.restore_signals()
        super().after_train(runner)

    def _is_failing(self, runner: Any) -> bool:
        """Whether the last save did; of a sharded model all take part in the next."""
        failing = [self._failing_since is not None]
        if runner.saves_together:
            broadcast_object_list(failing)
        return failing[0]

    def restore_signals(self) -> None:
        """Stops listening."""
        if self._signals is not None:
            self._signals.restore()
            self._signals = None

    def _is_time(self) -> bool:
        now = time.monotonic()
        if self._failing_since is not None:
            return now - self._tried_at > RETRY_SECONDS
        return now - self._saved_at > self.autosave_seconds

    def _save_checkpoint_with_step(
        self, runner: Any, step: int, meta: dict[str, int]
    ) -> None:
        """MMEngine's, which deletes first and waits for the disk."""
        if not has_stepped(runner.optim_wrapper):  # after a validation
            self._due = step, meta
            return
        self._due = None
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        if self.max_keep_ckpts > 0 and not runner.skipped_in_a_row:
            ids = [*(i for i in self.keep_ckpt_ids if i != step), step]
            for old in ids[: -self.max_keep_ckpts]:
                path = self.file_backend.join_path(
                    self.out_dir, self.filename_tmpl.format(old)
                )
                if self.file_backend.isfile(path):
                    self.file_backend.remove(path)
            self.keep_ckpt_ids.clear()
            self.keep_ckpt_ids.extend(ids[-self.max_keep_ckpts :])
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._write(runner, name, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        """MMEngine's, which takes for saved what a disk refused."""
        if not self.save_best:
            return
        self._try(runner, runner.writer.wait)
        hub = runner.message_hub
        info = hub.runtime_info
        known = {name: info[name] for name in info if name.startswith('best_')}
        attributes = {
            name: copy.copy(value)
            for name, value in vars(self).items()
            if name.startswith('best_ckpt_path')
        }
        super()._save_best_checkpoint(runner, metrics)
        self._try(runner, runner.writer.wait)
        doomed = self.file_backend.take(best=True)
        now = {name: info[name] for name in info if name.startswith('best_ckpt')}
        saved = [
            all(
                self.file_backend.isfile(path)
                for name, path in now.items()
                if known.get(name) != path
            )
        ]
        broadcast_object_list(saved)  # one process writes
        if saved[0]:
            for entry in doomed:
                self._remove(entry)
            return
        for name in [name for name in info if name.startswith('best_')]:
            hub.pop_info(name)
        hub.update_info_dict(known)
        self.__dict__.update(attributes)
        runner.logger.warning(
            'The best checkpoint could not be written: the one before stays the best.'
        )

    def _autosave(self, runner: Any, epoch: int, done: int) -> None:
        position = getattr(runner.train_loop, 'position', None)
        if self.by_epoch and position is None:
            return  # another loop would begin its epoch anew
        if not self.by_epoch or position is None or not position.taken:
            same = self.filename_tmpl.format(epoch if self.by_epoch else done)
            if Path(self.out_dir, same).is_file():
                return
        count = f'epoch_{epoch}_iter_{done}' if self.by_epoch else f'iter_{done}'
        self._write(runner, f'{AUTOSAVE}{count}.pth', dict(epoch=epoch, iter=done))

    def _write(self, runner: Any, name: str, meta: dict[str, int]) -> None:
        """Has a checkpoint written, and what it replaces removed afterwards."""
        # On all processes, of which one writes.
        self._tried_at = self._saved_at = time.monotonic()
        self._wrote_at = runner.iter
        if not runner.skipped_in_a_row:
            self._doomed += self.file_backend.take(best=False)
        doomed = list(self._doomed)  # those of saves that failed as well

        def then() -> None:
            self._failing_since = None
            try:
                self._point_to(runner, name)
                for entry in doomed:
                    self._remove(entry)
                if not runner.skipped_in_a_row:
                    self._remove_autosaves(name)
            except OSError as error:
                raise CheckpointWriteError(f'{self.out_dir}: {error}') from error

        self._try(
            runner,
            lambda: runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=dict(meta),
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                then=then,
                **self.args,
            ),
        )

    def _remove(self, entry: tuple[Callable[[str], None], str]) -> None:
        """Removes a file that is neither gone nor wanted again."""
        remove, path = entry
        if entry in self._doomed:
            self._doomed.remove(entry)
        best = getattr(self, 'best_ckpt_path_dict', {}).values()
        if path not in (getattr(self, 'best_ckpt_path', None), *best):
            with contextlib.suppress(FileNotFoundError):
                remove(path)

    def _point_to(self, runner: Any, name: str) -> None:
        """A pointer that survives when the folder moves."""
        path = self.file_backend.join_path(self.out_dir, name)
        inside = os.path.abspath(self.out_dir) == os.path.abspath(runner.work_dir)
        write_text(Path(runner.work_dir, POINTER), name if inside else path)

    def _remove_autosaves(self, but: str) -> None:
        newest = progress(Path(but))
        for path in Path(self.out_dir).glob(f'{AUTOSAVE}*.pth'):
            done = progress(path)
            if done and newest and done < newest:
                path.unlink(missing_ok=True)

    def _try(self, runner: Any, action: Callable[[], None]) -> None:
        """Does what may find that a disk refused.

        Raises:
            CheckpointWriteError: It does so for too long.
        """
        try:
            action()
        except CheckpointWriteError as error:
            now = self._tried_at = time.monotonic()
            self._failing_since = self._failing_since or now
            left = self.give_up_seconds - (now - self._failing_since)
            kept = checkpoints(self.out_dir)
            last = f'the last is {kept[0].name}' if kept else 'there is none'
            if left < 0:
                raise CheckpointWriteError(
                    f'{error}; for {self.give_up_seconds / 60:g} minutes nothing '
                    f'could be saved, {last}: make room, then go on with --resume'
                ) from error
            runner.logger.warning(
                f'{error}: training goes on and tries again in {RETRY_SECONDS} s, for '
                f'{left / 60:.0f} more minutes; {last}'
            )

    def _stop(self, runner: Any, done: int, alone: bool = False) -> None:
        """Ends this process when the state is on the disk."""
        self._try(runner, runner.writer.wait)
        if is_main_process():
            with contextlib.suppress(OSError):
                Path(runner.work_dir, INTERRUPTED).touch()
        if not alone:
            self._agreement.wait_for_all()
        self.restore_signals()
        kept = checkpoints(self.out_dir)
        raise Interrupted(
            f'{signal.Signals(self._stopping).name} ended the run after iteration '
            f'{done}; {kept[0].name if kept else "nothing"} is saved in '
            f'{self.out_dir}: go on with --resume',
            alone and get_world_size() > 1,
        )
