"""A runner whose checkpoints are read safely and fit their model, and whose
data is checked as it is built."""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop
from mmengine.runner import Runner as MMEngineRunner
from torch.utils.data import DataLoader

from convnext_mm.checkpoint import (
    CheckpointError,
    CheckpointFileError,
    CheckpointMismatchError,
)
from convnext_mm.checkpoint.errors import shown
from convnext_mm.datasets.data_check import check_dataset, explain_failure, leaf_configs


class Runner(MMEngineRunner):
    """MMEngine's runner; bad data and a checkpoint that does not fit stop it
    with a sentence. Everything that it stores resumes: weights, optimizer,
    schedulers, message hub.
    """

    def build_dataloader(
        self, dataloader: DataLoader | dict, *args: Any, **kwargs: Any
    ) -> DataLoader:
        """As MMEngine's, with the data set checked.

        Raises:
            DataError: It is bad; names the file and what to do.
        """
        try:
            loader = super().build_dataloader(dataloader, *args, **kwargs)
        except Exception:
            if isinstance(dataloader, dict):
                for dataset in leaf_configs(dataloader['dataset']):
                    explain_failure(dataset)
            raise
        check_dataset(loader.dataset, self.model)
        return loader

    def load_or_resume(self) -> None:
        """As MMEngine's.

        Raises:
            CheckpointError: The checkpoint cannot be read, is not safe, has not
                all weights of a ConvNeXt backbone, or, to resume, no state of a
                training run like this one.
        """
        what = shown(self._load_from or self.work_dir)
        try:
            super().load_or_resume()
        except (torch.cuda.OutOfMemoryError, torch.distributed.DistError):
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

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """As MMEngine's; which best checkpoint the next better one replaces is
        found in the work folder: paths in a checkpoint are not followed.

        Raises:
            CheckpointMismatchError: It is from beyond the end of this run.
        """
        super().resume(*args, **kwargs)
        loop = self.train_loop
        unit = 'epoch' if isinstance(loop, EpochBasedTrainLoop) else 'iter'
        end = getattr(loop, f'max_{unit}s', self.iter)
        if getattr(self, unit) > end:
            raise CheckpointMismatchError(
                f'it was saved after {unit} {getattr(self, unit)}, and this '
                f'run ends at {end}: raise train_cfg.max_{unit}s'
            )
        for hook in self.hooks:
            if not isinstance(hook, CheckpointHook) or not hook.save_best:
                continue
            several = len(hook.key_indicators) > 1
            for key in hook.key_indicators:
                best = self._best_checkpoint(hook, key)
                if best is not None:
                    self.message_hub.update_info(
                        f'best_ckpt_{key}' if several else 'best_ckpt', str(best)
                    )

    def _best_checkpoint(self, hook: CheckpointHook, key: str) -> Path | None:
        """The newest best one of a metric in the work folder that this run saved
        before now."""
        last = self.epoch if hook.by_epoch else self.iter
        name = '.+' if key == 'auto' else re.escape(key.replace('/', '_'))
        number = re.escape(hook.filename_tmpl).replace(r'\{\}', r'(\d+)')
        found = [
            path
            for path in Path(self.work_dir).glob('best_*')
            if (match := re.fullmatch(f'best_{name}_{number}', path.name))
            and int(match[1]) <= last
        ]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
