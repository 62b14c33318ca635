"""What the recipes in configs/custom and configs/rtmdet promise beside training:
layer decay, weights, what is frozen, the steps of one GPU."""

import copy
import re
from functools import partial

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from convnext_mm.analysis.complexity import build_model
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.apis.config import load_config
from convnext_mm.apis.config_check import check_config
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.datasets.errors import DataError
from convnext_mm.models import ConvNeXt
from convnext_mm.models.layer_id import get_layer_id
from recipe_models import (
    FEW_PROPOSALS,
    build_toy,
    learning_rates,
    load,
    stand_in,
    toy,
    toy_inputs,
    train_and_run,
)
from repo import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
NEW = re.compile('-dinov3-|-v2-|accum|ins-l')
RECIPES = sorted(
    str(path.relative_to(ROOT))
    for folder in ('custom', 'rtmdet')
    for path in (ROOT / 'configs' / folder).glob('*.py')
    if NEW.search(path.name)
)
FROZEN = [p for p in RECIPES if 'frozen' in p or 'linear' in p]
ONE_GPU = [p for p in RECIPES if 'accum' in p]
RTMDET = [p for p in RECIPES if 'rtmdet' in p]
NUM_LAYERS = dict(tiny=6, base=12)
SMALL_RTMDET = {
    'backbone.drop_path_rate': 0,  # else both images may skip a block
    # Of group norms, for few channels:
    'neck.norm_cfg.num_groups': 4,
    'bbox_head.norm_cfg.num_groups': 4,
}
TOY_OF_FROZEN = {
    'semantic': {'decode_head.channels': 112, 'test_cfg.mode': 'whole'},
    'instances': FEW_PROPOSALS,
    'classes': {},
}


def kind_of(path):
    if 'ade20k' in path:
        return 'semantic'
    return 'classes' if 'in1k' in path else 'instances'


def wrapper_of(cfg, model):
    init_default_scope(cfg.default_scope)
    return build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))


def test_there_are_recipes_of_each_kind():
    assert (len(RECIPES), len(FROZEN), len(ONE_GPU), len(RTMDET)) == (20, 5, 2, 5)


@pytest.mark.parametrize('path', RECIPES)
def test_real_arch(path):
    """Blocks, initial weights, and the learning rate of each of its parameters."""
    cfg = load(path)
    check_config(cfg, 'train')
    model = build_model(cfg)
    backbone = model.backbone
    v2, dinov3 = '-v2-' in path, '-dinov3-' in path
    assert all((b.grn is not None) == v2 for s in backbone.stages for b in s)
    checkpoint = cfg.model.backbone.init_cfg.checkpoint
    assert ('convnextv2_' in checkpoint) == v2
    assert ('dinov3-convnext-' in checkpoint) == dinov3
    assert cfg.model.backbone.arch in checkpoint
    wrapper = wrapper_of(cfg, model)
    settings = cfg.optim_wrapper.paramwise_cfg
    decay_type = settings.get('decay_type', 'layer_wise')
    layers = NUM_LAYERS[cfg.model.backbone.arch]
    seen = set()
    for group in wrapper.optimizer.param_groups:
        for name in group['param_names']:
            seen.add(name)
            if name.startswith('backbone.'):
                below = layers + 1 - get_layer_id(name, layers, decay_type)
                scale = settings.decay_rate**below
                lr = cfg.optim_wrapper.optimizer.lr * scale
                assert group['lr'] == pytest.approx(lr), name
    assert seen == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('path', RECIPES)
def test_missing_data_is_named(path):
    with pytest.raises(DataError, match=r'train_dataloader: .* does not exist'):
        check_data(
            load_config(str(ROOT / path), data_root='/nowhere'), ['train_dataloader']
        )


@pytest.mark.parametrize('path', [p for p in RECIPES if 'linear_8xb2' not in p])
def test_another_arch_by_option(path):
    changes = {
        'model.backbone.arch': 'large',
        'optim_wrapper.paramwise_cfg.num_layers': None,
    }
    cfg = load_config(str(ROOT / path), cfg_options=changes)
    check_config(cfg, 'train')
    wrapper_of(cfg, build_model(cfg))


@pytest.mark.parametrize('path', RTMDET)
def test_rtmdet(path):
    cfg = toy(path, SMALL_RTMDET)
    model, *_ = train_and_run(cfg)
    assert type(model.backbone) is ConvNeXt
    assert cfg.train_cfg.max_epochs == 100
    assert cfg.param_scheduler[1].end == 100


@pytest.mark.parametrize('path', FROZEN)
def test_frozen(path):
    """Nothing of it has a gradient or an entry in the optimizer, or changes."""
    cfg = toy(path, {**TOY_OF_FROZEN[kind_of(path)], 'backbone.drop_path_rate': 0.5})
    model, wrapper = build_toy(cfg)
    model.train()
    before = copy.deepcopy(model.state_dict())
    frozen = {
        name
        for name in before
        if name.startswith(('backbone.downsample_layers', 'backbone.stages'))
    }
    named = dict(model.named_parameters())
    trained = {n for g in wrapper.optimizer.param_groups for n in g['param_names']}
    assert len(frozen) > 50 and not frozen & trained
    assert trained == {name for name, p in named.items() if p.requires_grad}
    assert not any(block.training for stage in model.backbone.stages for block in stage)
    init_default_scope(cfg.default_scope)
    model.train_step(toy_inputs(cfg), wrapper)
    assert all(named[name].grad is None for name in frozen)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not frozen & changed
    assert trained <= changed


@pytest.mark.parametrize('path', [p for p in FROZEN if 'linear' in p])
def test_linear_head(path):
    """One linear map reads what the norms give."""
    head = build_model(load(path))
    head = head.head if kind_of(path) == 'classes' else head.decode_head
    weights = {n: tuple(p.shape) for n, p in head.named_parameters() if p.ndim > 1}
    assert weights in (
        {'fc.weight': (1000, 768)},
        {'conv_seg.weight': (150, 1440, 1, 1)},
    )


@pytest.mark.parametrize('path', ONE_GPU)
def test_one_gpu_is_as_published(path):
    """Images for a step, and the learning rate of every step."""
    cfg = load(path)
    folder = 'cascade' if 'cascade' in path else 'upernet'
    name = re.sub(r'1xb\d-accum\d', '8xb2', path)
    published = load(name.replace('custom', folder))
    batches = cfg.optim_wrapper.accumulative_counts
    assert cfg.train_dataloader.batch_size * batches == 16
    assert cfg.optim_wrapper.optimizer == published.optim_wrapper.optimizer
    steps = range(0, 2000, 37)
    epoch = 10**6  # in none of these steps does one end
    ours, theirs = (
        learning_rates(config, stand_in([1e-4]), epoch, 2000 * count, sample)
        for config, count, sample in (
            (cfg, batches, [step * batches for step in steps]),
            (published, 1, steps),
        )
    )
    for step in steps:
        assert ours[step * batches] == pytest.approx(theirs[step], rel=1e-4)
    if folder == 'upernet':
        assert cfg.train_cfg.max_iters == published.train_cfg.max_iters * batches
        assert cfg.param_scheduler[1].end == cfg.train_cfg.max_iters + 1


@pytest.mark.slow
@pytest.mark.parametrize('path', ONE_GPU)
def test_memory_of_one_gpu(path):
    """What docs/recipes.md says that the backbone keeps for backward, bf16."""
    settings = dict(load(path).model.backbone, init_cfg=None, drop_path_rate=0)
    settings.pop('type'), settings.pop('_scope_', None)
    assert settings['with_cp'] and settings['impl'] == 'lean+'

    def bytes_for_a_pixel(**changes):
        with torch.device('meta'):
            model = ConvNeXt(**{**settings, **changes})
        model = model.to_empty(device='cpu')  # values do not matter
        kept = []
        for size in (32, 64):
            image = torch.zeros(1, 3, size, size)
            with torch.autocast('cpu', torch.bfloat16):
                kept.append(saved_bytes(partial(model, image), model))
        return (kept[1] - kept[0]) / (64**2 - 32**2)

    assert bytes_for_a_pixel(with_cp=False, impl='lean') == pytest.approx(1199, abs=1)
    assert bytes_for_a_pixel(with_cp=False) == pytest.approx(455, abs=1)
    assert bytes_for_a_pixel() == pytest.approx(425, abs=1)
