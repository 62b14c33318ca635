"""What train.py and test.py do before a runner exists."""

import os
import sys

import pytest
import torch
from mmengine.config import Config

from convnext_mm.apis import test, train
from convnext_mm.apis.config import load_config
from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.launch import fit_to_device
from repo import ROOT, load_tool, parsed

RECIPE = 'configs/mask_rcnn/mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py'
DEMO = 'configs/demo/mask-rcnn_convnext-atto_shapes.py'


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def message(tool_name, *argv):
    """What a tool says as it stops."""
    with pytest.raises(SystemExit) as caught:
        load_tool(tool_name).main(list(argv))
    assert str(caught.value).startswith('error: ')
    return str(caught.value)


def test_unknown_config_names_close_ones():
    said = message('train', RECIPE.replace('convnext-t_', 'convnext-tiny_'))
    assert 'convnext-tiny_fpn' in said and RECIPE in said
    assert '`convnext-mm zoo` lists' in message('test', 'x.py', str(ROOT / 'LICENSE'))


def test_missing_data_names_the_file_and_the_source(tmp_path):
    said = message('train', RECIPE, '--data-root', str(tmp_path))
    for word in (
        'train_dataloader',
        'instances_train2017.json',
        str(tmp_path),
        'cocodataset.org',
        '--data-root',
    ):
        assert word in said
    said = message('train', DEMO, '--data-root', str(tmp_path / 'none'))
    assert 'python -m convnext_mm.datasets data/shapes' in said


def test_missing_image_folder(tmp_path):
    write_shapes(tmp_path, 1, 1, 64)
    (tmp_path / 'images' / 'training').rename(tmp_path / 'elsewhere')
    assert 'data_prefix.img' in message('train', DEMO, '--data-root', str(tmp_path))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save({}, path)
    return str(path)


@pytest.mark.slow
def test_missing_checkpoints(checkpoint):
    for path, reason in (
        ('none.pth', 'no such file'),
        ('configs', 'directory'),
        ('LICENSE', 'neither a file of torch.save nor'),
    ):
        for args in (('test', DEMO, path), ('train', DEMO, '--resume', path)):
            said = message(*args)
            assert f'{path}: ' in said and reason in said
    assert '.pkl' in message('test', DEMO, checkpoint, '--out', 'a.json')


def test_auto_scale_lr_needs_a_base_batch_size():
    assert 'base_batch_size' in message('train', DEMO, '--auto-scale-lr')


@pytest.mark.parametrize('error', ["No module named 'mmcv._ext'", 'undefined symbol'])
def test_missing_operators_are_said_with_the_command(monkeypatch, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == 'mmcv.ops':
                raise ImportError(error)

    for name in [n for n in sys.modules if n.startswith('mmcv.ops')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Broken(), *sys.meta_path])
    with pytest.raises(ConfigError, match=f'{error}.*convnext_mm.compat.mmcv_ops'):
        load_config(DEMO)


def test_data_root_needs_one_to_replace():
    with pytest.raises(ValueError, match='--data-root'):
        load_config('configs/_base_/schedules/adamw_3x.py', data_root='/x')


def test_data_root_reaches_every_path(tmp_path):
    cfg = load_config(DEMO, data_root=str(tmp_path))
    root = f'{tmp_path}/'
    assert cfg.data_root == cfg.train_dataloader.dataset.data_root == root
    assert cfg.test_evaluator.ann_file == (
        root + 'annotations/instances_validation.json'
    )
    assert 'data/shapes/' not in str({k: v for k, v in cfg.items() if k != 'data_help'})


def test_datasets_inside_wrappers_are_checked():
    inner = dict(type='CocoDataset', data_root='/none', ann_file='a.json')
    for dataset in (
        dict(type='RepeatDataset', dataset=inner, times=2),
        dict(type='ConcatDataset', datasets=[inner]),
    ):
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        with pytest.raises(ValueError, match='/none/a.json'):
            check_data(cfg, ['train_dataloader', 'val_dataloader'])
    remote = dict(type='CocoDataset', data_root='s3://b/', ann_file='a.json')
    check_data(
        Config(dict(train_dataloader=dict(dataset=remote))), ['train_dataloader']
    )


def test_a_path_of_the_documentation_needs_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(RECIPE).filename.endswith(RECIPE)
    with pytest.raises(ConfigError, match='does not exist'):
        load_config('configs/mask_rcnn/none.py')


def test_work_dir_defaults_to_the_config_name():
    assert load_config(DEMO).work_dir == ('work_dirs/mask-rcnn_convnext-atto_shapes')
    cfg = load_config(DEMO, cfg_options={'train_cfg.max_iters': 3})
    assert cfg.train_cfg.max_iters == 3


@pytest.mark.parametrize(
    'option, said',
    [
        ({'model.backbone.arch': dict(depths=(1,) * 4)}, '_delete_=True'),
        ({'train_pipeline.99.type': 'Resize'}, 'Index 99 exceeds'),
        ({'train_dataloader.batch_size.x': 1}, 'batch_size'),
    ],
)
def test_options_that_do_not_fit(option, said):
    with pytest.raises(ConfigError, match=f'^cfg_options: .*{said}') as caught:
        load_config(RECIPE, cfg_options=option)
    assert len(str(caught.value)) < 500


def model_with_sync_bn():
    norm = dict(type='SyncBN', requires_grad=True)
    return dict(
        neck=dict(norm_cfg=dict(norm)),
        head=[dict(norm_cfg=dict(norm)), dict(a=(dict(norm),))],
    )


@pytest.mark.parametrize('launcher', ['none', 'pytorch'])
def test_fit_to_a_cpu(launcher, capsys):
    cfg = Config(
        dict(
            launcher=launcher,
            model=model_with_sync_bn(),
            optim_wrapper=dict(
                type='AmpOptimWrapper',
                loss_scale='dynamic',
                dtype='float16',
                accumulative_counts=2,
            ),
        )
    )
    fit_to_device(cfg, 'cpu')
    assert cfg.optim_wrapper == dict(type='OptimWrapper', accumulative_counts=2)
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    said = capsys.readouterr().out
    assert 'No mixed precision on cpu' in said
    if launcher == 'none':  # MMEngine replaces SyncBN and says so
        assert 'SyncBN' in str(cfg.model)
    else:
        assert 'SyncBN' not in str(cfg.model)
        assert 'No SyncBN on a CPU: 3 norm settings use BN' in said
        assert cfg.model_wrapper_cfg.device_ids is None


@pytest.mark.parametrize(
    'device, kind, fused',
    [
        ('cuda', 'convnext_mm.AmpOptimWrapper', True),
        ('cpu', 'convnext_mm.AmpOptimWrapper', True),  # it sees to CPUs itself
        ('npu', 'convnext_mm.AmpOptimWrapper', False),
        ('mps', 'OptimWrapper', True),
    ],
)
def test_what_a_device_cannot_do_is_left_out(device, kind, fused, capsys):
    cfg = Config(
        dict(
            launcher='none',
            model={},
            optim_wrapper=dict(
                type='convnext_mm.AmpOptimWrapper',
                dtype='auto',
                optimizer=dict(type='AdamW', fused=True),
            ),
        )
    )
    fit_to_device(cfg, device)
    assert cfg.optim_wrapper.type == kind
    assert ('dtype' in cfg.optim_wrapper) == ('Amp' in kind)
    assert cfg.optim_wrapper.optimizer.fused is fused
    said = capsys.readouterr().out
    assert ('No fused optimizer on npu' in said) is not fused


def test_a_gpu_config_stays_as_it_is():
    before = Config(
        dict(
            launcher='pytorch',
            model=model_with_sync_bn(),
            optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic'),
        )
    )
    after = Config(before.to_dict())
    fit_to_device(after, 'cuda')
    assert before.to_dict() == after.to_dict()


def test_amp_and_resume_arguments(tmp_path, checkpoint):
    write_shapes(tmp_path, 1, 1, 64)
    common = ('train', DEMO, '--data-root', tmp_path)
    cfg = train.prepare(**parsed(*common, '--resume'))
    assert cfg.resume is True and cfg.load_from is None
    cfg = train.prepare(**parsed(*common, '--resume', checkpoint))
    assert cfg.load_from == checkpoint


def test_show_dir_switches_the_hook_on(tmp_path, checkpoint):
    write_shapes(tmp_path, 1, 1, 64)
    cfg = test.prepare(DEMO, checkpoint, data_root=str(tmp_path), show_dir='x')
    assert cfg.default_hooks.visualization.draw is True
    assert cfg.default_hooks.visualization.test_out_dir == os.path.abspath('x')
