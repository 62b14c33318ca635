"""A runner whose checkpoints are read safely and fit their model, and whose
data is checked as it is built."""

import functools
import importlib
import os
import pickle
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mmengine
import torch
import torch.distributed
from mmengine.dataset import InfiniteSampler
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    get_world_size,
    is_main_process,
)
from mmengine.fileio import join_path
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop, save_checkpoint
from mmengine.runner import EpochBasedTrainLoop as MMEngineEpochBasedTrainLoop
from mmengine.runner import IterBasedTrainLoop as MMEngineIterBasedTrainLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convnext_mm.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
)
from convnext_mm.checkpoint.errors import CheckpointWriteError, shown
from convnext_mm.checkpoint.write import BackgroundWriter
from convnext_mm.datasets.coco_file import reading_once
from convnext_mm.datasets.data_check import check_dataset, explain_failure, leaf_configs

from . import supervision
from .agreement import ServesLastSteps
from .errors import ConfigError
from .hooks import CheckpointHook, GradientCheckHook, NonFiniteHook, StallHook
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop
from .outputs import tolerate_refusals
from .settings import changes, check_changes, flatten
from .sharding import ShardableRunner
from .work_folder import (
    check_newest,
    check_unused,
    checkpoints,
    clear,
    forget,
    locked,
    newest_valid,
    pointed_at,
)

# MMEngine's, as a config may name them, and ours.
TRAIN_LOOPS: dict[Any, type] = {
    name: ours
    for theirs, ours in (
        (MMEngineEpochBasedTrainLoop, EpochBasedTrainLoop),
        (MMEngineIterBasedTrainLoop, IterBasedTrainLoop),
    )
    for name in (theirs, theirs.__name__, f'mmengine.{theirs.__name__}')
}
SAFETY_HOOKS: dict[str, Any] = dict(
    gradient_check=dict(type=GradientCheckHook),
    non_finite=dict(type=NonFiniteHook),
    stall=dict(type=StallHook),
)
CHECKPOINT_HOOKS = (MMEngineCheckpointHook, 'CheckpointHook', 'mmengine.CheckpointHook')


class _LooksAtState(Hook):
    """Sees a checkpoint before the model does."""

    priority = 'VERY_LOW'  # the hook of averaged weights exchanges them

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Checks changed settings, and takes what may differ from the model."""
        runner.note_meta(checkpoint.get('meta') or {})
        runner.fill_allowed(checkpoint.get('state_dict', checkpoint))


def load_formatter() -> None:
    """Imports what formats configs. Of several processes that do so for the first
    time on a machine, one may find its cache empty, while another writes it."""
    for _ in range(10):
        try:
            importlib.import_module('yapf.yapflib.yapf_api')
            return
        except (EOFError, pickle.UnpicklingError):
            time.sleep(0.2)


class Runner(ShardableRunner):
    """MMEngine's runner; bad data and a checkpoint that does not fit stop it
    with a sentence, and what it saves resumes as if nothing had happened:
    weights, optimizer, schedulers, message hub, and the place in the data.

    MMEngine's ``CheckpointHook`` and training loops become ours of these names.
    What is resumed or tested must have every weight of the model and no other,
    but for names that begin with one of the config's ``allow_state_keys``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.writer = BackgroundWriter()
        self.skipped_in_a_row = 0  # steps, up to now
        self._is_strict = False
        self.loaded_meta: dict[str, Any] = {}  # of the checkpoint that is resumed
        load_formatter()
        super().__init__(*args, **kwargs)
        supervision.note_work_dir(self.work_dir)
        self.register_hook(_LooksAtState())

    def train(self) -> nn.Module:
        """As MMEngine's, with the work folder to itself.

        Raises:
            ConfigError: The folder belongs to another run, or holds checkpoints
                and the run neither goes on from the newest nor overwrites them.
        """
        with ExitStack() as stack:
            decided: list[Any] = [None, None]  # the problem, whether to go on
            # A machine that joined only now does not know of the start before.
            is_restart = any(all_gather_object(supervision.is_restart(self.work_dir)))
            if is_main_process():
                try:
                    stack.enter_context(locked(self.work_dir))
                    decided[1] = self._start_in_folder(is_restart)
                except ConfigError as error:
                    decided[0] = str(error)
            broadcast_object_list(decided)  # all do the same
            problem, goes_on = decided
            if problem is not None:
                raise ConfigError(problem)
            if goes_on:
                self._resume, self._load_from = True, None
            supervision.mark_started(self.work_dir)
            stack.callback(self._finish_writing)
            tolerate_refusals(self.visualizer, self.logger)
            for hook in self.hooks:
                if isinstance(hook, CheckpointHook):
                    stack.callback(hook.restore_signals)
                elif isinstance(hook, StallHook):
                    stack.callback(hook.stop)
            return super().train()

    def _finish_writing(self) -> None:
        """However the run ended, before another one may have the folder."""
        try:
            self.writer.wait()
        except CheckpointWriteError as error:
            self.logger.error(str(error))

    def _start_in_folder(self, is_restart: bool) -> bool:
        """Whether this run goes on from what it saved before.

        Args:
            is_restart: It was started in this folder before.

        Raises:
            ConfigError: It holds checkpoints that this run would mix with.
        """
        folder, source = self.checkpoint_folder, self._load_from
        if not any(isinstance(hook, CheckpointHook) for hook in self.hooks):
            return False
        # Files of other names or places are known by the pointer alone.
        pointed = pointed_at(self.work_dir) or ''
        elsewhere = '://' in pointed or Path(pointed).is_file()
        if is_restart and (checkpoints(folder) or elsewhere):
            return True
        if self._resume and source is None:
            return False
        start = Path(source) if self._resume and source else None
        if self.cfg.get('overwrite'):
            needed = None if self._resume else source
            clear(folder, self.work_dir, start, needed)
        elif start:
            check_newest(start, folder)
        else:
            check_unused(folder, self.work_dir)
        if not start:
            forget(self.work_dir)
        return False

    def register_default_hooks(self, hooks: dict | None = None) -> None:
        """As MMEngine's, with those that keep a run safe; None leaves one out."""
        hooks = {**SAFETY_HOOKS, **(hooks or {})}
        super().register_default_hooks(
            {
                name: hook
                for name, hook in hooks.items()
                if hook is not None or name not in SAFETY_HOOKS
            }
        )

    def dump_config(self) -> None:
        """As MMEngine's, without what was asked of this start alone: who trains with
        the config in a work folder has not asked to delete what is there."""
        asked = {
            key: self.cfg.pop(key) for key in ('resume', 'overwrite') if key in self.cfg
        }
        try:
            super().dump_config()
        finally:
            self.cfg.update(asked)

    def test(self) -> dict:
        """As MMEngine's; the checkpoint must have what the model has."""
        self._is_strict = True
        return super().test()

    def val(self) -> dict:
        """As MMEngine's; the checkpoint must have what the model has."""
        self._is_strict = True
        return super().val()

    def register_hook(self, hook: Hook | dict, priority: Any = None) -> None:
        """As MMEngine's; its checkpoint hook is ours."""
        if isinstance(hook, dict) and hook.get('type') in CHECKPOINT_HOOKS:
            hook = dict(hook, type=CheckpointHook)
        super().register_hook(hook, priority)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """As MMEngine's; its loops are ours."""
        if isinstance(loop, dict):
            loop = dict(loop)
            if 'by_epoch' in loop and 'type' not in loop:
                by_epoch = loop.pop('by_epoch')
                loop['type'] = f'{"Epoch" if by_epoch else "Iter"}BasedTrainLoop'
            loop['type'] = TRAIN_LOOPS.get(loop.get('type'), loop.get('type'))
        return super().build_train_loop(loop)

    def build_dataloader(
        self, dataloader: DataLoader | dict, *args: Any, **kwargs: Any
    ) -> DataLoader:
        """As MMEngine's, with the data set checked.

        Raises:
            DataError: It is bad; names the file and what to do.
        """
        with reading_once():
            try:
                loader = super().build_dataloader(dataloader, *args, **kwargs)
            except Exception:
                if isinstance(dataloader, dict):
                    for dataset in leaf_configs(dataloader['dataset']):
                        explain_failure(dataset)
                raise
            loader.worker_init_fn = ServesLastSteps(loader.worker_init_fn)
            check_dataset(
                loader.dataset,
                self.model,
                self.cfg.get('max_unreadable_images', 0),
                Path(self.log_dir) / 'unreadable_images.txt',
            )
        return loader

    def load_or_resume(self) -> None:
        """As MMEngine's; without a name, the newest checkpoint of the work folder
        that can be read.

        Raises:
            CheckpointError: The checkpoint cannot be read, is not safe, has not
                all weights of a ConvNeXt backbone, or, to resume, no state of a
                training run like this one.
        """
        if self._has_loaded:
            return
        source = self._load_from
        if self._resume and source is None:
            source = newest_valid(self.checkpoint_folder, self.work_dir) or pointed_at(
                self.work_dir
            )
            if source is None:
                self.logger.warning(
                    f'{self.checkpoint_folder} holds no checkpoint: training starts '
                    'from the beginning.'
                )
        if source is None:
            return
        what = shown(source)
        try:
            (self.resume if self._resume else self.load_checkpoint)(str(source))
        except (torch.cuda.OutOfMemoryError, torch.distributed.DistError, ConfigError):
            raise  # no fault of the file
        except CheckpointError as error:
            if what in str(error):
                raise
            raise type(error)(f'{what}: {error}') from error
        # MMEngine looks things up as it goes, in what may hold anything.
        except Exception as error:
            if self._resume and isinstance(error, KeyError):
                raise CheckpointFileError(
                    f'{what}: to resume it needs the state of a training run, '
                    f'and has no {shown(error)}: to start from its weights, '
                    'set load_from and leave out --resume'
                ) from error
            raise CheckpointFileError(
                f'{what}: does not fit {type(self.model).__name__} '
                f'({type(error).__name__}: {shown(error)})'
            ) from error

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = 'cpu',
        strict: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As MMEngine's; strict where a run resumes or a model is tested.

        Raises:
            CheckpointMismatchError: Names are missing or unexpected, or shapes
                differ.
        """
        strict = strict or self._is_strict
        try:
            return super().load_checkpoint(filename, map_location, strict, **kwargs)
        except CheckpointMismatchError as error:
            if not strict or 'its weights are not those' not in str(error):
                raise
            raise CheckpointMismatchError(
                f'{error}; give the config that it was trained with, or name what '
                'may differ: --cfg-options allow_state_keys="[\'auxiliary_head\']"'
            ) from error

    @functools.cached_property
    def checkpoint_folder(self) -> str:
        """Where this run's checkpoints lie."""
        out_dir = next(
            (h.out_dir for h in self.hooks if isinstance(h, CheckpointHook)), None
        )
        if out_dir in (None, self.work_dir):
            return self.work_dir
        return os.path.join(out_dir, os.path.basename(self.work_dir.rstrip('/')))

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """As MMEngine's, at the sample where it was left; which best checkpoint the
        next better one replaces is found in the work folder: paths in a checkpoint
        are not followed. Changed settings are listed.

        Raises:
            CheckpointMismatchError: It is from beyond the end of this run, or a
                setting has changed that a resumed run would not follow.
        """
        self._is_strict = True
        schedulers = self.param_schedulers
        fresh = (
            [s.state_dict() for s in schedulers] if isinstance(schedulers, list) else []
        )
        super().resume(*args, **kwargs)
        loop = self.train_loop
        unit = 'epoch' if isinstance(loop, MMEngineEpochBasedTrainLoop) else 'iter'
        end = getattr(loop, f'max_{unit}s', self.iter)
        if getattr(self, unit) > end:
            raise CheckpointMismatchError(
                f'it was saved after {unit} {getattr(self, unit)}, and this '
                f'run ends at {end}: raise train_cfg.max_{unit}s'
            )
        if getattr(self, unit) == end:
            self.logger.warning(
                f'The run that is resumed was over, after {unit} {end}: nothing is '
                f'left to train, unless train_cfg.max_{unit}s is raised.'
            )
        if hasattr(loop, 'position'):
            self._go_to_position(loop, fresh)
        for hook in self.hooks:
            if not isinstance(hook, CheckpointHook) or not hook.save_best:
                continue
            several = len(hook.key_indicators) > 1
            for key in hook.key_indicators:
                best = self._best_checkpoint(hook, key)
                ending = f'_{key}' if several else ''
                if best is not None:
                    self.message_hub.update_info(f'best_ckpt{ending}', str(best))
                else:  # the next one is
                    self.message_hub.pop_info(f'best_ckpt{ending}', None)
                    self.message_hub.pop_info(f'best_score{ending}', None)

    def note_meta(self, meta: dict[str, Any]) -> None:
        """Lists the settings that changed since a checkpoint to resume.

        Raises:
            CheckpointMismatchError: One that a resumed run would not follow.
        """
        self.loaded_meta = meta
        before = meta.get('settings')
        if not self._resume or not isinstance(before, dict):
            return
        changed = changes(before, flatten(self.cfg._cfg_dict))
        check_changes(changed)
        for name, (old, new) in changed.items():
            self.logger.info(
                f'Changed since it was saved: {shown(name)} was {shown(old, 80)}, '
                f'is {shown(new, 80)}.'
            )

    def fill_allowed(self, state_dict: dict[str, Tensor]) -> None:
        """Makes what ``allow_state_keys`` names as the model has it, in place."""
        prefixes = self.cfg.get('allow_state_keys') or ()
        allowed = tuple([prefixes] if isinstance(prefixes, str) else prefixes)
        if not (self._is_strict and allowed):
            return
        own = self._bare_model.state_dict()
        for name in {*own, *state_dict}:
            if name.removeprefix('module.').startswith(allowed):
                if name in own:
                    state_dict[name] = own[name]
                else:
                    del state_dict[name]

    def roll_back(self) -> None:
        """Before a step: takes the state of the newest checkpoint, if there is one,
        and goes on with the data that comes next."""
        self._finish_writing()
        source = newest_valid(self.checkpoint_folder, self.work_dir)
        if source is None:
            return
        loop: Any = self.train_loop
        position = loop.position.state_dict()
        self.skipped_in_a_row = 0
        self._resume = True  # which the hook of averaged weights asks
        super().resume(str(source))
        self.optim_wrapper.initialize_count_status(
            self.model, loop.iter, loop.max_iters
        )
        self.logger.warning(
            f'Back to {source}, on with batch {position["taken"]} of the data.'
        )

    def _go_to_position(self, loop: Any, fresh: list[dict[str, Any]]) -> None:
        """Where the checkpoint that is resumed was in its data.

        Args:
            loop: The training loop.
            fresh: Of :meth:`_rescale_schedules`.
        """
        state = self.loaded_meta.get('position')
        if state is None:  # of MMEngine's runner
            batches = len(loop.dataloader)
            number, taken = self.epoch, self.iter - self.epoch * batches
            if isinstance(loop, IterBasedTrainLoop):
                endless = isinstance(loop.dataloader.sampler, InfiniteSampler)
                number, taken = (
                    (0, self.iter) if endless else divmod(self.iter, batches)
                )
            elif not 0 <= taken < batches:
                taken = 0
            state = dict(loop.position.state_dict(), round=number, taken=taken)
        samples = loop.position.load_state_dict(state, self.seed)
        before = state['world_size'] * state['batch_size']
        now = get_world_size() * loop.position.batch_size
        if before == now and state['world_size'] == get_world_size():
            return
        if isinstance(loop, EpochBasedTrainLoop):
            self._rescale_schedules(fresh)
            loop._iter = loop.epoch * len(loop.dataloader) + loop.position.taken
        self.logger.info(
            f'Saved with {state["world_size"]} processes of {state["batch_size"]} '
            f'images, now {get_world_size()} of {loop.position.batch_size}: goes on '
            f'behind sample {samples} of round {state["round"]}'
            + (
                f', of which the last {samples % now} come again.'
                if samples % now
                else '.'
            )
        )

    def _rescale_schedules(self, fresh: list[dict[str, Any]]) -> None:
        """Schedules that were told in epochs and count steps go on at the same part
        of the run, where an epoch has another number of steps now.

        Args:
            fresh: States of the schedulers before those of a checkpoint.
        """
        schedulers: Any = self.param_schedulers
        for scheduler, state in zip(schedulers or (), fresh):
            if not scheduler.by_epoch and scheduler.end != state['end'] > 0:
                share = state['end'] / scheduler.end
                values = ('base_values', '_last_value')
                last_step = round(scheduler.last_step * share)
                offset = scheduler._global_step - scheduler.last_step
                scheduler.load_state_dict(
                    {
                        **state,
                        **{name: getattr(scheduler, name) for name in values},
                        'last_step': last_step,
                        '_global_step': last_step + offset,
                    }
                )

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict | None = None,
        by_epoch: bool = True,
        backend_args: dict | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """As MMEngine's; written by a thread of its own, as a whole or not at all.

        Args:
            out_dir, filename: Where to.
            file_client_args, backend_args: Of a disk that is not mounted; there it
                is written at once.
            save_optimizer, save_param_scheduler, meta, by_epoch: MMEngine's.
            then: Called when the file is in its place.

        Raises:
            CheckpointWriteError: By ``writer``, later: it could not be written.
        """
        content = self.training_state(save_optimizer, save_param_scheduler)
        content['meta'] = {
            'epoch': self.epoch + 1 if by_epoch else self.epoch,
            'iter': self.iter if by_epoch else self.iter + 1,
            **(meta or {}),
            **content['meta'],
        }
        if not is_main_process():
            return
        self.call_hook('before_save_checkpoint', checkpoint=content)
        path = join_path(out_dir, filename, backend_args=backend_args)
        if file_client_args is None and backend_args is None and '://' not in path:
            self.writer.write(content, Path(path), then)
        else:
            save_checkpoint(content, path, file_client_args, backend_args)
            then()

    def training_state(
        self, save_optimizer: bool = True, save_param_scheduler: bool = True
    ) -> dict[str, Any]:
        """What a checkpoint holds, in MMEngine's layout; its ``meta`` has the place
        in the data and the settings as well."""
        meta = dict(
            cfg=self._config_text,
            settings=self._settings,
            seed=self.seed,
            experiment_name=self.experiment_name,
            time=time.strftime('%Y%m%d_%H%M%S'),
            mmengine_version=mmengine.__version__,
        )
        if hasattr(self.train_dataloader.dataset, 'metainfo'):
            meta['dataset_meta'] = self.train_dataloader.dataset.metainfo
        if hasattr(self.train_loop, 'position'):
            meta['position'] = self.train_loop.position.state_dict()
            meta['validated'] = self.train_loop.validated
        state = dict(
            meta=meta,
            state_dict=self._bare_model.state_dict(),
            message_hub=self.message_hub.state_dict(),
        )
        if save_optimizer:
            state['optimizer'] = self.optim_wrapper.state_dict()
        schedulers = self.param_schedulers
        if save_param_scheduler and schedulers is not None:
            state['param_schedulers'] = (
                {k: [s.state_dict() for s in v] for k, v in schedulers.items()}
                if isinstance(schedulers, dict)
                else [s.state_dict() for s in schedulers]
            )
        return state

    @property
    def _bare_model(self) -> nn.Module:
        if isinstance(self.model, BaseTTAModel):
            return self.model.module
        return self.model.module if is_model_wrapper(self.model) else self.model

    @functools.cached_property
    def _config_text(self) -> str:
        return self.cfg.pretty_text

    @functools.cached_property
    def _settings(self) -> dict[str, str]:
        return flatten(self.cfg._cfg_dict)

    def _best_checkpoint(self, hook: CheckpointHook, key: str) -> Path | None:
        """The newest best one of a metric in the work folder that this run saved
        before now."""
        last = self.epoch if hook.by_epoch else self.iter
        name = '.+' if key == 'auto' else re.escape(key.replace('/', '_'))
        number = re.escape(hook.filename_tmpl).replace(r'\{\}', r'(\d+)')
        found = [
            path
            for path in Path(self.checkpoint_folder).glob('best_*')
            if (match := re.fullmatch(f'best_{name}_{number}', path.name))
            and int(match[1]) <= last
        ]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
