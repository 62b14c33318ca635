"""A run that was interrupted gives the weights of one that was not, bit for bit."""

import json
import os
import random
import signal
import traceback

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.data import Dataset

from convnext_mm import ConvNeXt
from convnext_mm.checkpoint import CheckpointMismatchError
from convnext_mm.engine.agreement import REQUEUE, Interrupted
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.runner import Runner
from convnext_mm.engine.work_folder import checkpoints, locked
from repo import run as run_command
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


MADE = []


@pytest.fixture(autouse=True)
def no_loaders_left():
    """One that is found among garbage waits 5 seconds for each of its processes."""
    yield
    for runner in MADE:
        vars(runner).clear()
    MADE.clear()


def make(folder, fault=None, by_epoch=False, workers=0, **settings):
    init_default_scope('mmengine')
    torch.manual_seed(0)
    loops = (
        dict(type='EpochBasedTrainLoop', max_epochs=3)
        if by_epoch
        else dict(type='IterBasedTrainLoop', max_iters=STEPS)
    )
    optim = settings.pop('optim_wrapper', {})
    hooks = settings.pop('hooks', [])
    checkpoint = dict(
        type='CheckpointHook',
        by_epoch=by_epoch,
        interval=1 if by_epoch else 4,
        max_keep_ckpts=1,
    )
    torch.manual_seed(random.SystemRandom().randrange(1000))  # nothing hangs on it
    model = settings.pop('model', None)
    if model is None:
        torch.manual_seed(0)
        model = Model()
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            num_workers=workers,
            persistent_workers=workers > 0,
            dataset=Augmented(),
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler'),
            **settings.pop('loader', {}),
        ),
        optim_wrapper={'optimizer': dict(type='AdamW', lr=0.01), **optim},
        param_scheduler=dict(
            type='CosineAnnealingLR', by_epoch=False, T_max=STEPS, begin=0, end=STEPS
        ),
        train_cfg=loops,
        default_hooks=dict(checkpoint={**checkpoint, **settings.pop('checkpoint', {})}),
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


CASES = {
    'iterations': {},
    'epochs': dict(by_epoch=True),
    'workers': dict(workers=2),
    'epochs-workers': dict(by_epoch=True, workers=2),
    'finite': dict(loader=dict(drop_last=True)),
    'average': dict(hooks=[dict(type='EMAHook', momentum=0.1)]),
    'accumulation': dict(optim_wrapper=dict(accumulative_counts=3)),
    'epochs-accumulation': dict(
        by_epoch=True, optim_wrapper=dict(accumulative_counts=3)
    ),
    'amp': dict(
        optim_wrapper=dict(type='convnext_mm.AmpOptimWrapper', dtype='bfloat16')
    ),
    'clipping': dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.1))),
}


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """Weights of undisturbed runs by case."""
    known = {}

    def get(case):
        if case not in known:
            runner = make(tmp_path_factory.mktemp('straight'), **CASES[case])
            runner.train()
            known[case] = weights(runner)
        return known[case]

    return get


@pytest.mark.slow
@pytest.mark.parametrize('at', [5, 10])
@pytest.mark.parametrize('how', [kill, terminate])
@pytest.mark.parametrize('case', CASES)
def test_resumed_is_undisturbed(case, how, at, straight, tmp_path):
    stopped = make(tmp_path, Fault(at, how), **CASES[case])
    with pytest.raises((Killed, Interrupted)) as error:
        stopped.train()
    traceback.clear_frames(error.tb)
    stopped.writer.wait()
    if how is terminate:
        assert error.value.code == REQUEUE
    fault = Fault()
    resumed = make(tmp_path, fault, resume=True, **CASES[case])
    resumed.train()
    assert same(weights(resumed), straight(case))
    waits = 2 if 'accumulation' in case else 0  # for the weights to change
    if how is terminate:
        assert fault.first is None or at <= fault.first <= at + waits
    assert fault.first is None or at - 4 - waits <= fault.first
