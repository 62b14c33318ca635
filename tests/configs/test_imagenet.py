"""ImageNet recipes against the published values, and one that runs."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import HOOKS, MODELS, init_default_scope
from PIL import Image

from convnext_mm import ConvNeXt
from convnext_mm.analysis.complexity import count, default_shape, total
from convnext_mm.archs import ARCHS
from convnext_mm.models.layer_id import get_layer_id
from recipe_models import (
    RECIPES,
    learning_rates,
    load,
    model_of,
    optim_wrapper_of,
    stand_in,
)
from repo import ROOT

PUBLISHED = json.loads((ROOT / 'tests/data/recipes.json').read_text())['imagenet']
PATHS = [path for path in RECIPES if 'imagenet' in path]
NUM_IMAGES = {1000: 1281167, 21841: 14197122}


def entries():
    """(id, group of settings, arch, drop path, image size, settings)."""
    for kind in ('train_1k', 'pretrain_22k'):
        for arch, rate in PUBLISHED[kind]['drop_path'].items():
            yield kind, arch, rate, 224, PUBLISHED[kind]
    for kind in ('from_1k_384', 'from_22k_224', 'from_22k_384'):
        settings = {**PUBLISHED['finetune'], **PUBLISHED['finetune'][kind]}
        for arch, rate in settings['drop_path'].items():
            yield kind, arch, rate, int(kind[-3:]), settings


def configs_of(kind, arch):
    names = {
        'train_1k': f'convnext-{arch}_*_in1k.py',
        'pretrain_22k': f'convnext-{arch}_*_in22k.py',
        'from_1k_384': f'convnext-{arch}_*_in1k-384px.py',
        'from_22k_224': f'convnext-{arch}-in22k-pre_*_in1k.py',
        'from_22k_384': f'convnext-{arch}-in22k-pre_*_in1k-384px.py',
    }
    return [path for path in PATHS if Path(path).match(names[kind])]


@pytest.fixture(scope='module', params=entries(), ids=lambda e: '-'.join(e[:2]))
def recipe(request):
    """(published settings, path of the config)."""
    paths = configs_of(*request.param[:2])
    assert len(paths) == 1
    return request.param, paths[0]


def test_every_config_is_published():
    listed = {configs_of(kind, arch)[0] for kind, arch, *_ in entries()}
    assert listed == set(PATHS)


def test_model(recipe):
    (kind, arch, rate, _size, settings), path = recipe
    cfg, model = load(path), model_of(path)
    backbone, head = model.backbone, model.head
    assert type(backbone) is ConvNeXt  # ours, in MMPretrain's scope
    assert (backbone.depths, backbone.channels) == ARCHS[arch][:2]
    assert backbone.gap_before_final_norm and backbone.out_indices == (3,)
    rates = [b.drop_path for stage in backbone.stages for b in stage]
    np.testing.assert_allclose(rates, np.linspace(0, rate, len(rates)), atol=1e-7)
    assert head.num_classes == settings.get('num_classes', 1000)
    assert head.fc.in_features == backbone.channels[3]
    smoothing = PUBLISHED['train_1k']['label_smoothing']
    assert head.loss_module.label_smooth_val == smoothing
    augments = model.data_preprocessor.batch_augments
    if settings['mixup']:
        mixup, cutmix = augments.augments
        assert (mixup.alpha, cutmix.alpha) == (settings['mixup'], settings['cutmix'])
    else:
        assert augments is None
    if kind == 'from_1k_384':  # the classifier of the same checkpoint
        assert head.init_cfg == dict(
            type='convnext_mm.ReleasedClassifierInit',
            checkpoint=cfg.model.backbone.init_cfg.checkpoint,
        )
    checkpoint = (cfg.model.backbone.get('init_cfg') or {}).get('checkpoint')
    if kind.startswith('from'):
        assert f'convnext_{arch}_{kind[5:].split("_")[0]}_224' in checkpoint
    else:
        assert checkpoint is None


@pytest.mark.parametrize('kind', ['train_1k', 'from_22k_224'])
def test_initial_weights(kind):
    """Truncated normal of std 0.02, the classifier of fine-tuning scaled."""
    cfg = load(configs_of(kind, 'tiny' if kind == 'train_1k' else 'base')[0])
    init_default_scope('mmpretrain')
    settings = copy.deepcopy(cfg.model)
    settings.backbone.update(
        arch=dict(depths=[1] * 4, channels=[64] * 4), init_cfg=None
    )
    settings.head.in_channels = 64
    settings.data_preprocessor = copy.deepcopy(cfg.data_preprocessor)
    torch.manual_seed(0)
    model = MODELS.build(settings)
    model.init_weights()
    scale = 1 if kind == 'train_1k' else PUBLISHED['finetune']['head_init_scale']
    assert model.head.fc.weight.std().item() == pytest.approx(0.02 * scale, rel=0.02)
    assert not model.head.fc.bias.any()
    block = model.backbone.stages[3][0]
    assert block.pwconv1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (block.gamma == PUBLISHED['train_1k']['layer_scale_init_value']).all()


def test_optimizer(recipe):
    (_kind, _arch, _, _, settings), path = recipe
    cfg, wrapper = load(path), optim_wrapper_of(path)
    assert type(wrapper).__name__ == 'OptimWrapper'  # full precision
    assert type(wrapper.optimizer).__name__ == 'AdamW'
    assert wrapper.clip_grad_kwargs is None
    lr = settings.get('base_lr', settings.get('lr'))
    decay = settings['layer_decay'] or 1
    params = dict(model_of(path).named_parameters())
    for group in wrapper.optimizer.param_groups:
        assert group['betas'] == (0.9, 0.999)
        for name in group['param_names']:
            scale = decay ** (13 - get_layer_id(name, 12))
            assert group['lr'] == pytest.approx(lr * scale)
            assert group['weight_decay'] == (
                settings['weight_decay'] if params[name].ndim > 1 else 0
            )
    gpus, batch = map(int, Path(path).name.split('_')[1].split('xb'))
    assert cfg.train_dataloader.batch_size == batch
    assert gpus * batch == settings['batch_size']
    assert cfg.auto_scale_lr.base_batch_size == settings['batch_size']
    assert not cfg.auto_scale_lr.enable


def test_average_of_weights(recipe):
    (kind, arch, _, _, settings), path = recipe
    hooks = [HOOKS.build(dict(hook)) for hook in load(path).get('custom_hooks', [])]
    # Fine-tuning: the released commands ask for it for xlarge alone.
    ema = settings.get('ema', 0.9999 if arch == 'xlarge' else None)
    if kind.startswith('from') and arch != 'xlarge':
        ema = None
    assert [1 - hook.ema_cfg['momentum'] for hook in hooks] == (
        [pytest.approx(ema)] if ema else []
    )


def test_schedule(recipe):
    """Cosine to 1e-6 after warm-up from 0, as the released code computes it."""
    (_kind, _arch, _, _, settings), path = recipe
    cfg = load(path)
    assert cfg.train_cfg.max_epochs == settings['epochs']
    num_images = NUM_IMAGES[settings.get('num_classes', 1000)]
    length = num_images // settings['batch_size']
    assert cfg.train_dataloader.drop_last
    num_iters = length * settings['epochs']
    warmup = length * settings['warmup_epochs']
    groups = optim_wrapper_of(path).optimizer.param_groups
    initial = [group['lr'] for group in groups]
    bases = [min(initial), max(initial)]
    lr = settings.get('base_lr', settings.get('lr'))
    sample = {
        0,
        1,
        2,
        100,
        warmup - 1,
        warmup,
        warmup + 1,
        num_iters - 1,
        *range(0, num_iters, 499),
    }
    seen = learning_rates(cfg, stand_in(bases), length, num_iters, sample)
    for iteration, rates in seen.items():
        for base, rate in zip(bases, rates):
            if iteration < warmup:
                published = iteration / (warmup - 1)
            else:
                phase = (iteration - warmup) / (num_iters - warmup)
                low = 1e-6 / lr
                published = low + (1 - low) * (1 + math.cos(math.pi * phase)) / 2
            assert rate / base == pytest.approx(published, rel=1e-4, abs=2e-9)


def test_pipelines(recipe):
    (kind, _arch, _, size, _settings), path = recipe
    cfg = load(path)
    init_default_scope('mmpretrain')
    train = {
        type(step).__name__: step
        for step in Compose(
            copy.deepcopy(cfg.train_dataloader.dataset.pipeline)
        ).transforms
    }
    assert train['RandomResizedCrop'].scale == (size, size)
    shared = PUBLISHED['train_1k']
    augment = train['RandAugment']
    assert [augment.magnitude_level, augment.magnitude_std] == shared['randaugment']
    assert train['RandomErasing'].erase_prob == shared['random_erasing']
    if kind == 'pretrain_22k':
        assert cfg.val_dataloader is None and cfg.test_dataloader is None
        return
    test = Compose(copy.deepcopy(cfg.test_dataloader.dataset.pipeline)).transforms
    names = [type(step).__name__ for step in test]
    if size == 384:
        assert names == ['LoadImageFromFile', 'Resize', 'PackInputs']
        assert test[1].scale == (384, 384) and not test[1].keep_ratio
    else:
        assert names == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
        assert (test[1].scale, test[2].crop_size) == (256, (224, 224))


def test_parameters_and_flops(recipe):
    (kind, arch, _, size, _settings), path = recipe
    cost = total(count(model_of(path), default_shape(load(path))))
    if kind == 'train_1k' and arch == 'tiny':
        assert cost.params == PUBLISHED['published']['tiny_classifier_parameters']
    figures = {
        **PUBLISHED['published']['in1k'],
        'xlarge': PUBLISHED['published']['in22k_finetuned_1k']['xlarge'],
    }[arch]
    if kind != 'pretrain_22k':  # whose classifier is larger
        assert round(cost.params / 1e6) == figures['params_M']
        if f'flops_G_{size}' in figures:
            assert cost.flops / 1e9 == pytest.approx(
                figures[f'flops_G_{size}'], rel=0.01
            )


def test_trains_and_evaluates(tmp_path, monkeypatch):
    """The tiny recipe through tools/train.py, on drawn images."""
    import importlib.util

    monkeypatch.chdir(ROOT)
    rng = np.random.default_rng(0)
    for split, number in (('train', 2), ('val', 1)):
        for label in ('n01440764', 'n01443537'):
            folder = tmp_path / 'imagenet' / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                image = rng.integers(0, 255, (72, 64, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f'{i}.JPEG')
    spec = importlib.util.spec_from_file_location('t', 'tools/train.py')
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    path = configs_of('train_1k', 'tiny')[0]
    train.main(
        [
            path,
            '--work-dir',
            str(tmp_path / 'run'),
            '--data-root',
            str(tmp_path / 'imagenet'),
            '--cfg-options',
            'train_dataloader.dataset.metainfo.classes=[tench,goldfish]',
            'val_dataloader.dataset.metainfo.classes=[tench,goldfish]',
            'model.backbone.arch=atto',
            'model.head.in_channels=320',
            'model.head.num_classes=2',
            'model.data_preprocessor.num_classes=2',
            'val_evaluator.topk=[1]',
            'train_cfg.max_epochs=1',
            'train_dataloader.batch_size=4',
            'train_dataloader.num_workers=0',
            'val_dataloader.num_workers=0',
            'train_dataloader.persistent_workers=False',
            'val_dataloader.persistent_workers=False',
            'param_scheduler.0.end=1',
            'param_scheduler.1.begin=1',
            'param_scheduler.1.end=2',
            'default_hooks.logger.interval=1',
        ]
    )
    log = next((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert math.isfinite(records[0]['loss'])
    assert 'accuracy/top1' in records[-1]
    saved = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)
    assert 'ema_state_dict' in saved
    assert 'backbone.norm3.weight' in saved['state_dict']


def test_missing_data_names_the_folder(tmp_path, monkeypatch):
    from convnext_mm.datasets.data_paths import check_data

    cfg = load(PATHS[0])
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    with pytest.raises(ValueError, match="train'.*image-net.org"):
        check_data(cfg, ['train_dataloader'])
