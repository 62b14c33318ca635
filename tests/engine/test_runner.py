"""Whole runs: load_from and resume are safe and complete."""

import gc
import multiprocessing
import os
import pickle
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.utils.data import Dataset

from convnext_mm import CheckpointError, ConvNeXt
from convnext_mm.checkpoint import CheckpointMismatchError, UnsafeCheckpointError
from convnext_mm.engine.launch import running
from convnext_mm.engine.runner import Runner, load_formatter
from toys import ARCH, detector, segmentor


class Toy(BaseModel):
    """A whole model: our backbone and a head."""

    def __init__(self, **settings):
        super().__init__()
        self.backbone = ConvNeXt(ARCH, out_indices=3, **settings)
        self.head = nn.Linear(ARCH['channels'][-1], 2)

    def forward(self, image, mode='tensor'):
        out = self.head(self.backbone(image)[0].mean((2, 3)))
        return dict(loss=out.square().mean()) if mode == 'loss' else out


class Images(Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(image=torch.full((3, 32, 32), float(index)))


class Stop(Hook):
    """Ends training early, as a fault would, and keeps what it sees."""

    def __init__(self, at=None):
        self.at, self.first = at, None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if self.first is None:
            hub = runner.message_hub
            self.first = dict(
                iter=runner.iter,
                steps={
                    float(state['step'])
                    for state in runner.optim_wrapper.optimizer.state.values()
                },
                lr=runner.optim_wrapper.get_lr()['lr'][0],
                losses=len(hub.get_scalar('train/loss').data[0])
                if 'train/loss' in hub.log_scalars
                else 0,
            )
        if runner.iter == self.at:
            raise KeyboardInterrupt


def make_runner(folder, model=None, stop=None, **settings):
    init_default_scope('mmengine')
    torch.manual_seed(0)
    return Runner(
        model=model or Toy(),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=2,
            num_workers=0,
            dataset=Images(),
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(
            type='MultiStepLR', by_epoch=False, milestones=[3, 5], gamma=0.1
        ),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[stop or Stop()],
        experiment_name=f'run-{os.urandom(4).hex()}',
        **settings,
    )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    runner = make_runner(folder, stop=Stop(at=4))
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    return folder


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """Weights after the same run without a fault."""
    runner = make_runner(tmp_path_factory.mktemp('straight'))
    runner.train()
    return runner.model.state_dict()


@pytest.mark.parametrize(
    'train_cfg',
    [
        dict(type='EpochBasedTrainLoop', max_epochs=1),
        dict(type='IterBasedTrainLoop', max_iters=3),
    ],
)
def test_loaders_end_with_the_run(train_cfg, tmp_path, monkeypatch):
    for registry, kind in ((MODELS, Toy), (DATASETS, Images)):
        monkeypatch.setitem(registry.module_dict, kind.__name__, kind)
    loader = dict(
        num_workers=1,
        persistent_workers=train_cfg['type'] == 'EpochBasedTrainLoop',
        dataset=dict(type='Images'),
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    cfg = dict(
        launcher='none',
        default_scope='mmengine',
        model=dict(type='Toy'),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(train_cfg, val_interval=1),
        val_cfg=dict(type='ValLoop'),
        val_evaluator=dict(type='DumpResults', out_file_path=f'{tmp_path}/out.pkl'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        log_level='ERROR',
    )
    gc.disable()  # only loaders that nothing holds end their processes
    try:
        with running(Config(cfg)) as runner:
            runner.train()
            persistent = loader['persistent_workers']
            assert bool(multiprocessing.active_children()) is persistent
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize('how', ['auto', 'path'])
def test_resume_restores_everything(how, run, straight):
    stop = Stop()
    settings = {}
    if how == 'path':
        settings = dict(load_from=str(run / 'epoch_2.pth'), cfg=dict(overwrite=True))
    runner = make_runner(run, stop=stop, resume=True, **settings)
    runner.train()
    saved = torch.load(run / 'epoch_2.pth', weights_only=False)
    assert stop.first['iter'] == 4 == saved['meta']['iter']
    assert stop.first['steps'] == {4.0}
    assert stop.first['lr'] == pytest.approx(0.001)
    assert stop.first['losses'] == 4
    assert runner.iter == 6
    for ours, theirs in zip(runner.model.state_dict().values(), straight.values()):
        assert torch.allclose(ours, theirs, atol=1e-7)


class OnlyBackbone(BaseModel):
    """What the sample run trained."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvNeXt(dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32]))

    def forward(self, image, mode='tensor'):
        outputs = self.backbone(image)
        return dict(loss=outputs[3].mean()) if mode == 'loss' else outputs


def test_sample_run_resumes(shared_dir, tmp_path):
    path = shared_dir / 'reference' / 'checkpoints' / 'mmengine_runner.pth'
    stop = Stop()
    runner = make_runner(
        tmp_path,
        OnlyBackbone(),
        stop,
        resume=True,
        load_from=str(path),
        cfg=dict(allow_state_keys='neck.'),
    )
    runner.train()
    assert stop.first['iter'] == 5
    assert stop.first['losses'] == 5
    assert len(stop.first['steps']) == 1 and min(stop.first['steps']) > 0


def test_resume_never_executes(run, tmp_path, monkeypatch):
    saved = torch.load(run / 'epoch_2.pth', weights_only=False)

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/canary',)

    saved['message_hub']['runtime_info']['x'] = Evil()
    torch.save(saved, tmp_path / 'evil.pth')
    for settings in (dict(resume=True), {}):
        runner = make_runner(tmp_path, load_from=str(tmp_path / 'evil.pth'), **settings)
        with pytest.raises(UnsafeCheckpointError, match='system'):
            runner.train()
    assert not (tmp_path / 'canary').exists()


def test_every_scheme_comes_through_the_reader():
    for name in (
        's3://bucket/x.pth',
        'mmcls://x',
        'pavi://x',
        'torchvision://no-such-model',
        'hf://x',
        '/nowhere/x.pth',
    ):
        with pytest.raises(CheckpointError):
            CheckpointLoader.load_checkpoint(name, 'cpu')


def test_load_from_foreign_backbone(tmp_path, run):
    source = Toy()
    names = (('dwconv', 'depthwise_conv'), ('pwconv', 'pointwise_conv'))
    state = {}
    for key, tensor in source.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        state[f'module.{key}'] = tensor
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'foreign.pth')
    target = make_runner(tmp_path, Toy())
    target.load_checkpoint(str(tmp_path / 'foreign.pth'))
    for ours, theirs in zip(
        target.model.state_dict().values(), source.state_dict().values()
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'prefix, hint',
    [('', 'init_cfg=dict'), ('encoder.', 'init_cfg=dict'), (None, 'no ConvNeXt')],
)
def test_load_from_without_the_backbone(prefix, hint, tmp_path):
    """MMEngine would log a line and train from noise."""
    state = {'head.weight': torch.zeros(2, 10)}
    if prefix is not None:
        state.update(
            {
                prefix + key: tensor
                for key, tensor in Toy().backbone.state_dict().items()
            }
        )
    torch.save(state, tmp_path / 'backbone.pth')
    with pytest.raises(CheckpointMismatchError, match=hint):
        make_runner(tmp_path).load_checkpoint(str(tmp_path / 'backbone.pth'))
    model = Toy(allow_partial=True)
    make_runner(tmp_path, model).load_checkpoint(str(tmp_path / 'backbone.pth'))


def test_load_from_incomplete_backbone(tmp_path):
    state = Toy().state_dict()
    del state['backbone.stages.0.0.dwconv.bias']
    torch.save(state, tmp_path / 'cut.pth')
    with pytest.raises(CheckpointMismatchError, match='dwconv.bias'):
        make_runner(tmp_path).load_checkpoint(str(tmp_path / 'cut.pth'))


def test_formatter_whose_cache_is_being_written(monkeypatch):
    for name in [name for name in sys.modules if name.startswith('yapf')]:
        monkeypatch.delitem(sys.modules, name)
    load, calls = pickle.load, []

    def load_late(file):
        calls.append(file)
        if len(calls) < 3:
            raise EOFError('Ran out of input')
        return load(file)

    monkeypatch.setattr(pickle, 'load', load_late)
    load_formatter()
    assert len(calls) > 2 and 'yapf.yapflib.yapf_api' in sys.modules


def test_average_resumes(tmp_path):
    for resume in (False, True):
        stop = Stop(at=None if resume else 2)
        runner = make_runner(tmp_path, stop=stop, resume=resume)
        runner.register_custom_hooks([dict(type='EMAHook')])
        if resume:
            runner.train()
        else:
            with pytest.raises(KeyboardInterrupt):
                runner.train()
    assert stop.first['iter'] == 2


@pytest.mark.parametrize('library, whole', [('mmdet', detector), ('mmseg', segmentor)])
def test_load_from_of_released_models(library, whole, tmp_path):
    """Models on mmpretrain's backbone: outputs stay, heads included."""
    pytest.importorskip(f'{library}.models')
    pytest.importorskip('mmpretrain.models')
    init_default_scope(library)
    settings = dict(arch=ARCH, out_indices=(0, 1, 2, 3), gap_before_final_norm=False)
    torch.manual_seed(0)
    reference = MODELS.build(
        whole(dict(type='mmpretrain.ConvNeXt', layer_scale_init_value=1.0, **settings))
    )
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    torch.save(
        dict(meta={}, state_dict=reference.state_dict()), tmp_path / 'released.pth'
    )
    ours = MODELS.build(whole(dict(type='convnext_mm.ConvNeXt', **settings)))
    runner = make_runner(tmp_path, ours)
    runner.load_checkpoint(str(tmp_path / 'released.pth'))
    image = torch.rand(1, 3, 64, 64)
    outputs = [
        flatten(model.eval()(image, None, mode='tensor')) for model in (ours, reference)
    ]
    assert len(outputs[0]) == len(outputs[1])
    for a, b in zip(*outputs):
        assert torch.allclose(a, b, atol=1e-5)


def flatten(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in flatten(part)]
