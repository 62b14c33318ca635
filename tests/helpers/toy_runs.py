"""Short runs of a small model that draws in every step and every sample."""

import os
import random
import signal

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.data import Dataset

from convnext_mm import ConvNeXt
from convnext_mm.engine.runner import Runner
from toys import ARCH

STEPS = 11


class Model(BaseModel):
    """Draws in each step: drop path, dropout."""

    def __init__(self, classes=2):
        super().__init__()
        self.backbone = ConvNeXt(
            ARCH, out_indices=3, drop_path_rate=0.5, layer_scale_init_value=1.0
        )
        self.head = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(ARCH['channels'][-1], classes)
        )

    def forward(self, image, mode='tensor'):
        out = self.head(self.backbone(image)[0].mean((2, 3)))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


class Augmented(Dataset):
    """Draws in each sample, from every generator."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 7

    def __getitem__(self, index):
        noise = torch.rand(3, 32, 32) * np.random.rand() + random.random()
        return dict(image=noise + index)


class Fault(Hook):
    """Happens after a step."""

    priority = 'ABOVE_NORMAL'

    def __init__(self, at=None, action=None):
        self.at, self.action, self.first = at, action, None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.first is None:
            self.first = runner.iter

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at:
            self.action()


class Killed(Exception):
    pass


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class Scores(BaseMetric):
    """What a validation after a step finds."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        step = MessageHub.get_current_instance().get_info('iter')
        return dict(score=next(s for at, s in self.scores.items() if at >= step))


MADE = []


def forget_runs():
    """A loader that is found among garbage waits 5 seconds for each process."""
    for runner in MADE:
        vars(runner).clear()
    MADE.clear()


def make(folder, fault=None, by_epoch=False, workers=0, finite=False, **settings):
    init_default_scope('mmengine')
    torch.manual_seed(0)
    loops = (
        dict(type='EpochBasedTrainLoop', max_epochs=3)
        if by_epoch
        else dict(type='IterBasedTrainLoop', max_iters=STEPS)
    )
    scores = settings.pop('scores', None)  # by step, of a validation every 4
    if scores is not None:
        loops['val_interval'] = 4
        settings.update(
            val_cfg={},
            val_evaluator=[Scores(scores)],
            val_dataloader=dict(
                batch_size=7,
                dataset=Augmented(),
                collate_fn=dict(type='default_collate'),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
        )
    schedule = dict(
        type='CosineAnnealingLR', by_epoch=False, T_max=STEPS, begin=0, end=STEPS
    )
    optim = settings.pop('optim_wrapper', {})
    hooks = settings.pop('hooks', [])
    checkpoint = dict(
        type='CheckpointHook',
        by_epoch=by_epoch,
        interval=1 if by_epoch else 4,
        max_keep_ckpts=1,
    )
    model = settings.pop('model', None)
    if model is None:
        torch.manual_seed(0)
        model = Model()
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=settings.pop('batch_size', 2),
            num_workers=workers,
            persistent_workers=workers > 0,
            dataset=Augmented(),
            collate_fn=dict(type='default_collate'),
            sampler=dict(
                type='DefaultSampler' if by_epoch or finite else 'InfiniteSampler'
            ),
            **settings.pop('loader', {}),
        ),
        optim_wrapper={'optimizer': dict(type='AdamW', lr=0.01), **optim},
        param_scheduler=settings.pop('param_scheduler', schedule),
        train_cfg=loops,
        default_hooks=dict(
            checkpoint=change
            if (change := settings.pop('checkpoint', {})) is None
            else {**checkpoint, **change},
            **settings.pop('default_hooks', {}),
        ),
        custom_hooks=[*hooks, fault or Fault()],
        randomness=dict(seed=3),
        experiment_name=f'run-{os.urandom(4).hex()}',
        **settings,
    )
    MADE.append(runner)
    return runner


def weights(runner):
    averaged = [h.ema_model for h in runner.hooks if hasattr(h, 'ema_model')]
    return [
        tensor.clone()
        for module in (runner.model, *averaged)
        for tensor in module.state_dict().values()
    ]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
