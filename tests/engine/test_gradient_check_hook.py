"""The hook that names parameters without gradient, on a CPU: one process, and
two over gloo."""

import contextlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hub import get_config
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from convnext_mm import ConvNeXt
from convnext_mm.datasets import write_shapes
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.hooks import GradientCheckHook
from convnext_mm.engine.hooks.gradient_check_hook import _changes
from repo import FEW_ITERATIONS, ROOT, free_port, run
from toys import ARCH
from warm_python import warm_python

CHANNELS = ARCH['channels']
# Stock models of MMDetection and MMSegmentation; what is unread when only their
# backbone changes, and the settings to change.
DETECTOR = (
    'backbone.norm0: its map is not read',
    {
        'backbone.out_indices': (1, 2, 3),
        'neck.in_channels': CHANNELS[1:],
        'neck.start_level': 0,
    },
)
STOCK = {
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': DETECTOR,
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': DETECTOR,
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py': (
        'backbone.norm1: its map is not read',
        {
            'backbone.out_indices': (0, 2, 3),
            'decode_head.in_index': 2,
            'auxiliary_head.in_index': 1,
        },
    ),
    'mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py': (
        'backbone.norm0, backbone.norm1: their maps are not read',
        {
            'backbone.out_indices': (2, 3),
            'decode_head.in_index': 1,
            'auxiliary_head.in_index': 0,
        },
    ),
}


def stock_model(name, changes=None):
    """A stock model on our backbone, without and with what the hook advises."""
    cfg = get_config(name)
    init_default_scope(cfg.default_scope)
    model = cfg.model
    model.pop('pretrained', None)
    model.backbone = dict(type='convnext_mm.ConvNeXt', arch=ARCH)
    if cfg.default_scope == 'mmdet':
        model.neck.update(in_channels=CHANNELS, out_channels=32)
        model.bbox_head.update(in_channels=32, feat_channels=32, stacked_convs=1)
    else:
        model.data_preprocessor.size = (64, 64)
        model.decode_head.update(in_channels=CHANNELS[3], channels=8)
        model.auxiliary_head.update(in_channels=CHANNELS[2], channels=8)
        if 'c1_in_channels' in model.decode_head:
            model.decode_head.update(c1_in_channels=CHANNELS[0], c1_channels=8)
    cfg.merge_from_dict({f'model.{key}': v for key, v in (changes or {}).items()})
    return revert_sync_batchnorm(MODELS.build(cfg.model)).train(), cfg.default_scope


def batch_for(scope):
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(2, [(3, 64, 64)] * 2, [2, 2], num_classes=80)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(150, (1, 64, 64))),
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)),
    )
    image = torch.randint(255, (3, 64, 64), dtype=torch.uint8)
    return pseudo_collate([dict(inputs=image, data_samples=sample)] * 2)


class Run:
    """What the hook sees of a runner; ``said`` are the warnings."""

    def __init__(self, model, optim_wrapper=None, **settings):
        self.model, self.said = model, []
        self.logger = SimpleNamespace(warning=self.said.append)
        if optim_wrapper is None:
            optimizer = torch.optim.SGD(model.parameters(), 1e-6)
            optim_wrapper = OptimWrapper(optimizer, **settings)
        self.optim_wrapper = optim_wrapper
        self.hook = GradientCheckHook()

    @contextlib.contextmanager
    def step(self):
        self.hook.before_train_iter(self, 0)
        yield
        self.hook.after_train_iter(self, 0)

    def train_step(self, scope):
        with self.step():
            self.model.train_step(batch_for(scope), self.optim_wrapper)

    @property
    def watched(self):
        return [p for p in self.model.parameters() if p._post_accumulate_grad_hooks]


@pytest.mark.slow
@pytest.mark.parametrize('name', STOCK)
def test_stock_models_in_one_process(name):
    pytest.importorskip(name.partition('::')[0])
    what, changes = STOCK[name]
    training = Run(*stock_model(name)[:1])
    scope = name.partition('::')[0]
    training.train_step(scope)
    (said,) = training.said
    assert f'{what}; set ' in said and 'several processes' in said
    for key, value in changes.items():
        assert f'{key}={value}' in said
    assert said.count('=') == len(changes)
    assert not training.watched
    training.train_step(scope)  # it has said it
    assert len(training.said) == 1
    # What it advises is enough.
    training = Run(*stock_model(name, changes)[:1])
    training.train_step(scope)
    assert training.said == []


def train_stock_models_together():
    """In each of two processes: stops in the first step, where PyTorch stops in
    the second one."""
    torch.distributed.init_process_group('gloo')
    for name, (_, changes) in STOCK.items():

        def training(advised=None, name=name, **settings):
            model, scope = stock_model(name, advised)
            return Run(MMDistributedDataParallel(model, **settings)), scope

        run_, scope = training()
        try:
            run_.train_step(scope)
        except ConfigError as error:
            print(f'{name} stops: {error}')
        run_, scope = training()
        for step in range(2):
            try:
                run_.model.train_step(batch_for(scope), run_.optim_wrapper)
            except RuntimeError as error:
                assert 'Expected to have finished reduction' in str(error)
                print(f'{name} PyTorch stops in step {step}')
        for advised, settings in (
            (changes, {}),
            (None, dict(find_unused_parameters=True)),
            (None, dict(static_graph=True)),
        ):
            run_, scope = training(advised, **settings)
            for _ in range(2):
                run_.train_step(scope)
            assert len(run_.said) == (advised is None)
            print(f'{name} trains')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_stock_models_in_two_processes(monkeypatch):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    monkeypatch.setenv('PYTHONPATH', str(ROOT / 'tests' / 'helpers'))
    said = run(
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node=2',
        f'--master_port={free_port()}',
        __file__,
    )
    for name, (what, changes) in STOCK.items():
        assert said.count(f'{name} stops: parameters without gradient: {what}') == 2
        assert said.count(f'{name} PyTorch stops in step 1') == 2
        assert said.count(f'{name} trains') == 6
        assert all(f'{key}={value}' in said for key, value in changes.items())


@pytest.mark.slow
def test_a_run_of_two_processes_ends_with_the_sentence(tmp_path):
    pytest.importorskip('mmseg')
    write_shapes(tmp_path / 'shapes', num_train=4, num_val=1, size=64)
    config = tmp_path / 'config.py'
    config.write_text(
        f'_base_ = {str(ROOT / "configs/demo/upernet_convnext-atto_shapes.py")!r}\n'
        'model = dict(decode_head=dict(\n'
        '    in_index=[1, 2, 3], in_channels=[80, 160, 320]))\n'
        "custom_hooks = [dict(type='convnext_mm.GradientCheckHook')]\n"
    )
    said = run(
        'bash',
        'tools/dist_train.sh',
        config,
        2,
        '--data-root',
        tmp_path / 'shapes',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        *FEW_ITERATIONS,
        'model.data_preprocessor.size=(64,64)',
        port=free_port(),
        python=warm_python(),
        check=False,
    )
    assert 'error: parameters without gradient: backbone.norm0: its map' in said
    assert 'decode_head.in_index=[0, 1, 2]' in said
    assert 'finished reduction' not in said
    assert not list((tmp_path / 'work').glob('*.pth'))


class Layers(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))

    def forward(self, *used):
        return sum(self.layers[i](torch.ones(1, 2)).sum() for i in used)


def test_other_parameters_are_named_and_frozen_ones_are_not():
    model = Layers(6)
    model.layers[1].requires_grad_(False)
    training = Run(model)
    with training.step():
        training.optim_wrapper.update_params(model(0))
    (said,) = training.said
    assert 'layers.2.weight, layers.2.bias, layers.3.weight' in said
    assert 'and 3 more' in said and 'layers.0' not in said and 'layers.1' not in said


def test_a_step_is_all_that_it_accumulates():
    model = Layers(3)
    training = Run(model, accumulative_counts=2)
    for used in ((0,), (0, 1)):
        assert training.said == []
        with training.step():
            training.optim_wrapper.update_params(model(*used))
    (said,) = training.said
    assert 'layers.2.weight' in said and 'layers.1' not in said


def test_a_step_that_mixed_precision_skips_counts():
    class Skipping(OptimWrapper):
        def step(self, **kwargs):
            assert any(p.grad.isnan().any() for p in model.layers[0].parameters())

    model = Layers(2)
    training = Run(model, Skipping(torch.optim.SGD(model.parameters(), 1)))
    with training.step():
        training.optim_wrapper.update_params(model(0) * math.nan)
    (said,) = training.said
    assert 'layers.1.weight' in said and 'layers.0' not in said


@pytest.mark.parametrize('impl', ['eager', 'lean', 'lean+'])
def test_blocks_that_drop_path_skips_have_gradients(impl):
    model = ConvNeXt(ARCH, drop_path_rate=0.999, impl=impl).train()
    training = Run(model)
    with training.step():
        loss = sum(out.square().sum() for out in model(torch.rand(1, 3, 64, 64)))
        training.optim_wrapper.backward(loss)
        assert all(not p.grad.any() for p in model.stages[-1].parameters())
    assert training.said == []


def test_the_last_map():
    """Its stage is of no use either; without norms of maps only it shows."""
    for out_norm in (True, False):
        model = nn.Sequential(ConvNeXt(ARCH, out_norm=out_norm))
        training = Run(model)
        with training.step():
            maps = model(torch.rand(1, 3, 64, 64))
            training.optim_wrapper.backward(sum(out.square().sum() for out in maps[:3]))
        (said,) = training.said
        assert '0.norm3: its map is not read; set 0.out_indices=(0, 1, 2) (' in said


@pytest.mark.parametrize(
    'reader, kept, changes',
    [
        (dict(in_index=-1), [1, 3], []),
        (dict(in_index=-2), [0, 2], ['neck.in_index=-1']),
        (dict(in_index=[0, 3]), [0, 3], ['neck.in_index=[0, 1]']),
        (dict(in_index=2), [0, 3], []),  # it reads one of those without gradient
        (
            dict(in_channels=[1, 2, 3, 4], start_level=1, end_level=2),
            [1, 2],
            ['neck.in_channels=[2, 3]', 'neck.start_level=0', 'neck.end_level=1'],
        ),
        (dict(in_channels=4), [1, 3], []),
    ],
)
def test_settings_of_what_reads_maps(reader, kept, changes):
    assert list(_changes('neck', SimpleNamespace(**reader), kept, 4)) == changes


def test_what_is_not_looked_at():
    model = Layers(2)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 1))
    several = OptimWrapperDict(a=wrapper, b=wrapper)
    for training in (Run(model, several), Run(nn.DataParallel(model), wrapper)):
        with training.step():
            assert not training.watched
        assert training.said == []


if __name__ == '__main__':
    train_stock_models_together()
