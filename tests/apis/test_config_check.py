"""Mistakes in configs are named before anything is built."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm.apis.config_check import NEEDED, check_config, check_paths
from convnext_mm.engine.errors import ConfigError
from repo import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
DETECTOR = 'configs/demo/mask-rcnn_convnext-atto_shapes.py'
SEGMENTOR = 'configs/demo/upernet_convnext-atto_shapes.py'
CLASSIFIER = 'configs/imagenet/convnext-tiny_32xb128_in1k.py'


def load(path, options=None):
    cfg = Config.fromfile(ROOT / path)
    cfg.merge_from_dict(options or {})
    return cfg


def refused(cfg, task='train'):
    with pytest.raises(ConfigError) as caught:
        check_config(cfg, task)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def shipped(library):
    """One config of every fourth folder that a library is installed with."""
    spec = find_spec(library)
    root = Path(spec.submodule_search_locations[0], '.mim', 'configs') if spec else None
    folders = sorted(root.iterdir()) if root and root.is_dir() else []
    configs = [next(iter(sorted(folder.rglob('*.py'))), None) for folder in folders]
    return [path for path in configs if path and '_base_' not in path.parts][::4]


@pytest.mark.slow
@pytest.mark.parametrize('library', ['', 'mmdet', 'mmseg', 'mmpretrain'])
def test_no_false_alarm(library):
    """Whatever has what a task needs passes, and stays as it is."""
    ours = [p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts]
    count = 0
    for path in shipped(library) if library else ours:
        try:
            cfg = Config.fromfile(path)
        except (
            KeyError,
            ModuleNotFoundError,
            OSError,
            RuntimeError,
        ):  # some of the shipped ones
            continue
        before = str(cfg)
        for task, needed in NEEDED.items():
            if all(cfg.get(key) is not None for key in ('model', *needed)):
                check_config(cfg, task)
                count += 1
        assert str(cfg) == before
    assert count > 40 or library


@pytest.mark.parametrize(
    'key, meant',
    [
        ('optim_wraper', 'optim_wrapper'),
        ('train_dataloder', 'train_dataloader'),
        ('default_hook', 'default_hooks'),
        ('val_evalutor', 'val_evaluator'),
        ('load_form', 'load_from'),
    ],
)
def test_keys_without_effect(key, meant):
    said = refused(load(DETECTOR, {f'{key}.a': 1}))
    assert said == f'{key} has no effect: did you mean {meant}?'
    # A config's own variable: something reads it.
    cfg = load(DETECTOR, {f'{key}.a': 1})
    for text in (f'x = {key}', f'f(**{key})', f'a == {key}', f'_base_.{key}.a'):
        check_config(
            Config(cfg.to_dict(), cfg_text=f'{key} = dict(a=1)\n{text}'), 'test'
        )
    for text in (f'{key} = dict(a=1)', f'{key}=dict(a=1)\n'):
        refused(Config(cfg.to_dict(), cfg_text=text), 'test')


@pytest.mark.parametrize(
    'key', ['models', 'conv_cfg', 'val_pipeline', 'gallery_dataloader', 'train_dataset']
)
def test_names_of_variables(key):
    cfg = load(DETECTOR, {f'{key}.a': 1})
    check_config(Config(cfg.to_dict(), cfg_text=f'x = {key}.a'), 'train')
    if key != 'models':  # nearly a key
        check_config(cfg, 'train')


@pytest.mark.parametrize('task', NEEDED)
def test_sections_that_a_task_needs(task):
    for section in ('model', *NEEDED[task]):
        cfg = load(SEGMENTOR)
        cfg.pop(section)
        assert f'needs {section}' in refused(cfg, task)


CHECKPOINT, LOGGER = (
    'default_hooks.checkpoint.interval',
    'default_hooks.logger.interval',
)
LR, DECAY = (f'optim_wrapper.optimizer.{name}' for name in ('lr', 'weight_decay'))


@pytest.mark.parametrize(
    'setting, values',
    [
        ('train_cfg.val_interval', [0, -1, 1.5, '3', math.nan, True]),
        ('train_cfg.max_iters', [0, -3, '100']),
        ('train_cfg.max_epochs', [0, 0.5]),
        ('train_cfg.val_begin', [-1]),
        (CHECKPOINT, [0, -2, '1']),
        (LOGGER, [0, -1, 2.5]),
        ('train_dataloader.batch_size', [0, -1, 2.0, '2']),
        ('val_dataloader.num_workers', [-1, 0.5]),
        ('train_dataloader.prefetch_factor', [0]),
        ('optim_wrapper.accumulative_counts', [0, -1, 1.5]),
        (LR, ['abc', '1e-4', -1e-4, math.nan, math.inf, False]),
        (DECAY, ['0.05', -0.1]),
    ],
)
def test_numbers(setting, values):
    for value in values:
        said = refused(load(DETECTOR, {setting: value}))
        assert said.startswith(f'{setting} must be a ') and f'got {value!r}' in said


def test_numbers_that_are_fine():
    for options in (
        {'train_cfg.max_iters': 1e5, 'train_cfg.val_interval': math.inf},
        {CHECKPOINT: -1, LOGGER: 50.0, LR: 0, DECAY: None},
        {'train_dataloader.batch_size': 0, 'train_cfg.val_interval': 0},
    ):
        check_config(load(DETECTOR, options), 'test')
        if 'train_dataloader.batch_size' not in options:  # no test reads it
            check_config(load(DETECTOR, options), 'train')


@pytest.mark.parametrize(
    'key, value', [('persistent_workers', True), ('prefetch_factor', 2)]
)
def test_settings_of_workers_without_any(key, value):
    options = {'num_workers': 0, 'persistent_workers': False, key: value}
    cfg = load(DETECTOR, {f'test_dataloader.{k}': v for k, v in options.items()})
    check_config(cfg, 'train')
    assert f'test_dataloader.{key}={value} needs data workers' in refused(cfg, 'test')


@pytest.mark.parametrize(
    'place, wrong, right',
    [
        ('optim_wrapper.optimizer.type', 'AdmW', 'AdamW'),
        ('optim_wrapper.type', 'OptimWraper', 'OptimWrapper'),
        (
            'optim_wrapper.constructor',
            'convnext_mm.LayerDecayOptimWraper',
            'convnext_mm.LayerDecayOptimWrapperConstructor',
        ),
        ('param_scheduler.0.type', 'LinearLr', 'LinearLR'),
        ('train_cfg.type', 'IterBasedTrainLop', 'IterBasedTrainLoop'),
        ('val_cfg.type', 'ValLop', 'ValLoop'),
        ('model.type', 'MaskRCN', 'MaskRCNN'),
        ('model.type', 'maskrcnn', 'MaskRCNN'),
        ('model.backbone.type', 'convnext_mm.ConvNext', 'convnext_mm.ConvNeXt'),
        ('model.neck.type', 'FPNN', 'FPN'),
        ('model.neck.type', 'mmdet.PAFPNN', 'mmdet.PAFPN'),
        ('model.roi_head.bbox_head.type', 'Shared2FCBoxHead', 'Shared2FCBBoxHead'),
        ('model.rpn_head.loss_cls.type', 'CrossEntropyLos', 'CrossEntropyLoss'),
        ('model.train_cfg.rpn.assigner.type', 'MaxIouAssigner', 'MaxIoUAssigner'),
        ('default_hooks.checkpoint.type', 'CheckpointHok', 'CheckpointHook'),
        ('train_dataloader.dataset.type', 'CocoDatset', 'CocoDataset'),
        ('train_dataloader.sampler.type', 'InfiniteSampeler', 'InfiniteSampler'),
        (
            'train_dataloader.dataset.pipeline.0.type',
            'LoadImageFromFil',
            'LoadImageFromFile',
        ),
        ('val_evaluator.type', 'CocoMetrics', 'CocoMetric'),
        ('visualizer.vis_backends.0.type', 'LocalVisBackends', 'LocalVisBackend'),
    ],
)
def test_unknown_types(place, wrong, right):
    said = refused(load(DETECTOR, {place: wrong}))
    assert said.startswith(f'{place}={wrong!r} is unknown')
    assert f'did you mean {right}' in said


def test_unknown_types_without_a_close_one():
    said = refused(load(DETECTOR, {'model.neck.type': 'Zwölf'}))
    assert 'model.neck.type' in said and 'custom_imports' in said
    said = refused(load(DETECTOR, {'model.neck.type': 'no_such_library.FPN'}))
    assert 'no_such_library has none of that name, or is not installed' in said
    # What is no type of a registry, and another library's.
    names = {
        'model.test_cfg.rpn.nms.type': 'anything',
        'model.neck.x': dict(type='conv'),
    }
    foreign = dict(type='Albu', transforms=[dict(type='RandomRotate90')])
    cfg = load(SEGMENTOR)
    cfg.train_dataloader.dataset.pipeline.append(foreign)
    check_config(cfg, 'train')
    check_config(load(DETECTOR, names), 'train')


def test_types_of_other_scopes():
    cfg = load(SEGMENTOR)
    cfg.model.decode_head = dict(type='mmdet.RetinaHead', num_classes=1, in_channels=8)
    check_config(cfg, 'train')
    assert 'did you mean mmdet.RetinaHead' in refused(
        load(SEGMENTOR, {'model.decode_head.type': 'RetinaHead'})
    )
    cfg.model.decode_head.update(type='RetinaHead', _scope_='mmdet')
    check_config(cfg, 'train')
    cfg.val_evaluator = [dict(metrics=[dict(type='IoUMetrc')])]
    assert 'val_evaluator.0.metrics.0.type' in refused(cfg)
    check_config(cfg, 'test')


MAPS = [40, 80, 160, 320]


@pytest.mark.parametrize(
    'path, options, words',
    [
        (
            DETECTOR,
            {'model.neck.in_channels': [96, 192, 384, 768]},
            ['model.neck.in_channels=[96, 192, 384, 768]', f'must be {MAPS}'],
        ),
        (
            DETECTOR,
            {'model.backbone.out_indices': (1, 2, 3)},
            [f'in_channels={MAPS}', 'must be [80, 160, 320]'],
        ),
        (DETECTOR, {'model.backbone.arch': 'tiny'}, ['must be [96, 192, 384, 768]']),
        (
            DETECTOR,
            {'model.backbone.arch': 'tny'},
            ["model.backbone: unknown arch 'tny'"],
        ),
        (
            DETECTOR,
            {'model.backbone.out_indices': (1, 4)},
            ['model.backbone: out_indices must be in [-4, 3], got 4'],
        ),
        (
            DETECTOR,
            {'model.backbone.depth': 50, 'model.backbone.style': 'pytorch'},
            ['model.backbone has depth, style', '_delete_=True'],
        ),
        (
            DETECTOR,
            {'model.backbone.archh': 'tiny'},
            ['model.backbone has archh', 'did you mean arch?'],
        ),
        (
            SEGMENTOR,
            {'model.backbone.out_indices': (1, 2, 3)},
            ['model.decode_head.in_index=[0, 1, 2, 3]', 'must be below 3'],
        ),
        (
            SEGMENTOR,
            {'model.decode_head.in_channels': MAPS[1:]},
            ['model.decode_head.in_channels=[80, 160, 320]', f'must be {MAPS}'],
        ),
        (
            SEGMENTOR,
            {'model.auxiliary_head.in_channels': 384},
            ['model.auxiliary_head.in_channels=384', 'must be 160'],
        ),
        (
            CLASSIFIER,
            {'model.head.in_channels': 512},
            ['model.head.in_channels=512', 'must be 768'],
        ),
        (
            CLASSIFIER,
            {'model.backbone.gap_before_final_norm': False},
            ['model.head takes pooled', 'gap_before_final_norm=True'],
        ),
        (
            'configs/custom/deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py',
            {'model.decode_head.c1_in_channels': 256},
            ['c1_in_channels=256', 'must be 96'],
        ),
        (
            'configs/custom/mask2former_convnext-t_8xb2-lsj-50e_coco.py',
            {'model.panoptic_head.in_channels': [256, 512, 1024, 2048]},
            ['model.panoptic_head.in_channels', 'must be [96, 192, 384, 768]'],
        ),
    ],
)
def test_what_reads_the_maps(path, options, words):
    if path == CLASSIFIER:
        pytest.importorskip('mmpretrain')
    said = refused(load(path, options))
    assert all(word in said for word in words), said


def test_paths_in_the_other_ones_place():
    check_paths(DETECTOR)
    check_paths(DETECTOR, 'https://example.org/x.pth')
    for config, checkpoint, words in (
        ('x.pth', 'a/b.py', 'give a/b.py x.pth'),
        ('x.pth', None, '--resume CHECKPOINT'),
        ('x.safetensors', 'y.pth', 'the config comes first'),
        ('a.py', 'b.py', "'b.py' is a config"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_paths(config, checkpoint)
