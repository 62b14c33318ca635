"""Configs of the roadmap and of the isotropic networks: any step by one option, trained
and resumed on drawn shapes; what reads the maps follows the backbone."""

import copy
import re

import pytest
import torch
from mmengine.registry import init_default_scope

from convnext_mm.analysis.complexity import build_model, count
from convnext_mm.apis.config import load_config
from convnext_mm.apis.config_check import check_config
from convnext_mm.apis.train import prepare
from convnext_mm.archs import ROADMAP, STEPS
from convnext_mm.datasets.shapes import write_shapes
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.launch import running
from repo import ROOT

SHAPES = dict(
    detector='configs/roadmap/mask-rcnn_modernized-resnet50_shapes.py',
    segmentor='configs/roadmap/upernet_modernized-resnet50_shapes.py',
)
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in ('roadmap', 'isotropic')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
# The shallowest that still has every kind of layer.
NARROW = {'model.backbone.width_multiplier': 0.125, 'model.backbone.depths': [1] * 4}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    write_shapes(str(folder), 4, 1, 64, 0)
    return folder


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def train(config, data, work_dir, step, iterations, **options):
    cfg = prepare(
        config,
        work_dir=str(work_dir),
        data_root=str(data),
        cfg_options={
            **NARROW,
            'model.backbone.step': step,
            'train_cfg.max_iters': iterations,
            'train_cfg.val_interval': 100,
            'train_dataloader.batch_size': 2,
            'train_dataloader.num_workers': 0,
            'train_dataloader.persistent_workers': False,
            'default_hooks.checkpoint.interval': 1,
            'default_hooks.checkpoint.save_best': None,
            'param_scheduler.0.end': 1,
            'param_scheduler.1.begin': 1,
            'val_dataloader': None,
            'val_cfg': None,
            'val_evaluator': None,
        },
        **options,
    )
    with running(cfg) as runner:
        runner.train()
        return copy.deepcopy(runner.model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('task', SHAPES)
def test_step_trains_and_resumes(task, step, shapes, tmp_path):
    """Two iterations at once are one, a checkpoint, and another."""
    at_once = train(SHAPES[task], shapes, tmp_path / 'a', step, 2)
    first = train(SHAPES[task], shapes, tmp_path / 'b', step, 1)
    resumed = train(SHAPES[task], shapes, tmp_path / 'b', step, 2, resume='auto')
    changed = 0
    for name, value in at_once.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, resumed[name]), name
        changed += not torch.equal(value, first[name])
    assert changed > len(at_once) / 2


@pytest.mark.parametrize('path', RECIPES)
def test_recipe_is_whole(path):
    cfg = load_config(path)
    check_config(cfg, 'train')
    shape = (64, 64) if 'shapes' in path else (128, 128)
    costs = count(build_model(cfg), shape)
    assert costs['backbone'].flops > 0


@pytest.mark.slow
@pytest.mark.parametrize('regime, step', [(r, s) for r in ROADMAP for s in STEPS])
def test_one_option_is_enough(regime, step):
    """For all three kinds of recipes."""
    digits = re.sub(r'\D', '', regime)
    for path in RECIPES:
        if f'modernized-resnet{digits}' not in path or 'shapes' in path:
            continue
        cfg = load_config(path, cfg_options={'model.backbone.step': step})
        check_config(cfg, 'train')
        model = build_model(cfg)
        assert model.backbone.decisions == ROADMAP[regime][step]
        count(model, (64, 64))
        wrapper = cfg.optim_wrapper
        init_default_scope(cfg.default_scope)
        from mmengine.optim import build_optim_wrapper

        wrapper = build_optim_wrapper(model, copy.deepcopy(wrapper))
        scales = [group['lr_scale'] for group in wrapper.optimizer.param_groups]
        assert max(scales) == 1


def test_ema_is_off():
    """Table 5 of the paper but for that; the isotropic ones have it."""
    for path in RECIPES:
        if 'in1k' in path:
            hooks = [hook['type'] for hook in load_config(path).custom_hooks]
            assert ('EMAHook' in hooks) == ('iso' in path)


def test_warm_up_of_isotropic():
    cfg = load_config('configs/isotropic/convnext-iso-large_32xb128_in1k.py')
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.begin, cosine.end) == (50, 50, 300)
    assert cfg.model.backbone.drop_path_rate == 0.5
    base = load_config('configs/imagenet/convnext-large_64xb64_in1k.py')
    assert cosine.eta_min_ratio == base.param_scheduler[1].eta_min_ratio
    assert warm_up.start_factor == base.param_scheduler[0].start_factor


def test_options_about_readers_count():
    """What an option says of a neck is not changed, and a misfit is an error."""
    cfg = load_config(
        SHAPES['detector'],
        cfg_options={
            'model.backbone.step': 'resnet',
            'model.neck.in_channels': [1, 2, 3, 4],
        },
    )
    assert cfg.model.neck.in_channels == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r'must be \[64, 128, 256, 512\]'):
        check_config(cfg, 'train')


@pytest.mark.parametrize(
    'path, readers',
    [
        (
            'configs/isotropic/mask-rcnn_convnext-iso-s_fpn_8xb2-amp-ms-crop-3x_coco.py',
            {'neck.0.in_channels': 768, 'neck.1.in_channels': [192, 384, 768, 768]},
        ),
        (
            'configs/isotropic/convnext-iso-small_upernet_8xb2-amp-160k_ade20k-512x512.py',
            {
                'neck.in_channels': 768,
                'decode_head.in_channels': [192, 384, 768, 768],
                'auxiliary_head.in_channels': 768,
            },
        ),
        (
            'configs/custom/deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py',
            {'decode_head.in_channels': 1024, 'decode_head.c1_in_channels': 128},
        ),
    ],
    ids=['pyramid and FPN', 'pyramid and heads', 'two settings of a head'],
)
def test_readers_of_a_larger_arch(path, readers):
    small = load_config(path)
    check_config(small, 'train')
    cfg = load_config(path, cfg_options={'model.backbone.arch': 'base'})
    check_config(cfg, 'train')
    count(build_model(cfg), (64, 64))
    for place, right in readers.items():
        value = cfg.model
        for key in place.split('.'):
            value = value[int(key)] if key.isdigit() else value[key]
        assert value == right
    small.merge_from_dict({'model.backbone.arch': 'base'})
    with pytest.raises(ConfigError, match='does not fit model.backbone'):
        check_config(small, 'train')


@pytest.mark.parametrize(
    'options, message',
    [
        ({'step': 'patchify'}, "no step 'patchify'; did you mean 'patchify stem'"),
        ({'regime': 'resnet100'}, "no regime 'resnet100'"),
        ({'stepp': 'resnet'}, 'stepp, which ModernizedResNet does not take'),
        ({'norm': 'SyncBN'}, 'norm must be one of'),
    ],
)
def test_bad_options(options, message):
    options = {f'model.backbone.{name}': value for name, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        load_config(SHAPES['segmentor'], cfg_options=options)
