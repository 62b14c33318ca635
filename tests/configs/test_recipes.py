"""Every published recipe against the objects that its config builds."""

import json
import warnings
from pathlib import Path

import mmdet.models
import mmseg
import numpy as np
import pytest
import torch
from mmdet.engine.optimizers.layer_decay_optimizer_constructor import (
    get_layer_id_for_convnext,
    get_stage_id_for_convnext,
)
from mmengine import optim
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope

from convnext_mm import AmpOptimWrapper, ConvNeXt
from convnext_mm.analysis.complexity import build_model, count, default_shape, total
from convnext_mm.engine.optimizers.layer_decay import LayerDecayOptimWrapperConstructor
from recipe_models import (
    RECIPES,
    learning_rates,
    load,
    model_of,
    optim_wrapper_of,
    stand_in,
)
from repo import ROOT

PUBLISHED = json.loads((ROOT / 'tests/data/recipes.json').read_text())
ENTRIES = PUBLISHED['detection'] + PUBLISHED['segmentation']
METHODS = dict(
    mask_rcnn='MaskRCNN', cascade_mask_rcnn='CascadeRCNN', upernet='EncoderDecoder'
)
COCO_EPOCH = 7330  # iterations: 117,266 images with objects, 16 at a time
# The released configurations in today's frameworks, without our backbone.
SHIPPED = {
    'mmdet': Path(mmdet.__file__).parent / '.mim/configs/convnext',
    'mmseg': Path(mmseg.__file__).parent / '.mim/configs/convnext',
}


def name_of(entry):
    return '-'.join((entry['method'], entry['arch'], entry['pretrain']))


def configs_of(entry):
    """Configs with the entry's method, network and pre-training."""
    found = []
    for path in RECIPES:
        if path.startswith('configs/imagenet'):
            continue
        model = load(path).model
        backbone = model.backbone
        release = (
            'https://dl.fbaipublicfiles.com/convnext/convnext_'
            f'{entry["arch"]}_{entry["pretrain"][2:]}_224'
        )
        if (
            model.type == METHODS[entry['method']]
            and backbone.arch == entry['arch']
            and backbone.init_cfg.checkpoint.startswith(release)
        ):
            found.append(path)
    return found


@pytest.fixture(scope='module', params=ENTRIES, ids=name_of)
def recipe(request):
    """(published entry, path of its config)."""
    paths = configs_of(request.param)
    assert len(paths) == 1, paths
    return request.param, paths[0]


def test_every_v1_config_is_published():
    listed = {path for entry in ENTRIES for path in configs_of(entry)}
    others = ('-v2-', '-dinov3-', '-clip-')
    ours = {
        path
        for path in RECIPES
        if not path.startswith('configs/imagenet')
        and not any(word in path for word in others)
    }
    assert len(listed) == len(ENTRIES) == 13 and listed == ours


def test_names_and_brevity(recipe):
    entry, path = recipe
    name = Path(path).name
    assert ('-amp-' in name) == entry['amp_fp16']
    assert ('in22k-pre' in name) == (entry['pretrain'] == 'in22k')
    assert f'{entry["gpus"]}xb{entry["batch_size_per_gpu"]}' in name
    code = [
        line
        for line in (ROOT / path).read_text().splitlines()
        if line and not line.startswith('#')
    ]
    assert len(code) <= 25


def test_model(recipe):
    entry, path = recipe
    cfg, model = load(path), model_of(path)
    arch = PUBLISHED['arch'][entry['arch']]
    backbone = model.backbone
    assert type(model).__name__ == METHODS[entry['method']]
    assert type(backbone) is ConvNeXt
    assert list(backbone.depths) == arch['depths']
    assert list(backbone.channels) == arch['dims']
    assert backbone.out_indices == (0, 1, 2, 3)
    rates = [block.drop_path for stage in backbone.stages for block in stage]
    np.testing.assert_allclose(
        rates, np.linspace(0, entry['drop_path_rate'], len(rates)), atol=1e-7
    )
    # Values need memory: the same settings on a narrow network.
    settings = dict(cfg.model.backbone, init_cfg=None)
    settings['arch'] = dict(depths=[1] * 4, channels=[8] * 4)
    narrow = MODELS.build(settings)
    for stage in narrow.stages:
        assert (stage[0].gamma == entry['layer_scale_init_value']).all()
        assert stage[0].grn is None


def test_optimizer(recipe):
    entry, path = recipe
    cfg, wrapper = load(path), optim_wrapper_of(path)
    constructor = cfg.optim_wrapper.constructor
    assert constructor == ('convnext_mm.' + LayerDecayOptimWrapperConstructor.__name__)
    # Published in fp16: ours is MMEngine's wrapper, in bf16 where possible.
    kind = AmpOptimWrapper if entry['amp_fp16'] else OptimWrapper
    assert type(wrapper) is kind
    assert issubclass(AmpOptimWrapper, optim.AmpOptimWrapper)
    assert wrapper.clip_grad_kwargs is None
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert wrapper.optimizer.defaults['fused'] is True
    # MMDetection's functions, of the released code, take different counts.
    num_ids = entry['num_layers'] + 2
    layer_id, limit = dict(
        layer_wise=(get_layer_id_for_convnext, num_ids - 2),
        stage_wise=(get_stage_id_for_convnext, num_ids),
    )[entry['decay_type']]
    params = dict(model_of(path).named_parameters())
    seen = 0
    for group in wrapper.optimizer.param_groups:
        assert list(group['betas']) == entry['betas']
        for name in group['param_names']:
            param = params[name]
            scale = entry['decay_rate'] ** (num_ids - 1 - layer_id(name, limit))
            assert group['lr'] == pytest.approx(entry['lr'] * scale, rel=1e-9), name
            decays = param.ndim > 1 and not name.endswith('.bias')
            assert group['weight_decay'] == (entry['weight_decay'] if decays else 0), (
                name
            )
            seen += 1
    assert seen == len(params)


def test_batch(recipe):
    entry, path = recipe
    cfg = load(path)
    assert cfg.train_dataloader.batch_size == entry['batch_size_per_gpu']
    assert cfg.auto_scale_lr == dict(
        enable=False, base_batch_size=entry['batch_size_per_gpu'] * entry['gpus']
    )


def published_factor(entry, iteration):
    """Learning rate over its base as mmcv 1.x computes it."""
    if entry['task'] == 'coco':
        epoch = iteration // COCO_EPOCH
        factor = 0.1 ** sum(epoch >= m for m in entry['lr_milestones'])
        iters, ratio = entry['warmup']['iters'], entry['warmup']['ratio']
    else:
        plan = entry['schedule']
        assert (plan['policy'], plan['min_lr']) == ('poly', 0)
        factor = (1 - iteration / entry['max_iters']) ** plan['power']
        iters, ratio = plan['warmup_iters'], plan['warmup_ratio']
    if iteration < iters:
        factor *= 1 - (1 - iteration / iters) * (1 - ratio)
    return factor


def test_schedule(recipe, record_property):
    entry, path = recipe
    cfg = load(path)
    if entry['task'] == 'coco':
        assert cfg.train_cfg.max_epochs == entry['max_epochs']
        length = COCO_EPOCH
        num_iters = length * entry['max_epochs']
        marks = [epoch * length for epoch in (1, 27, 33)]
    else:
        assert cfg.train_cfg.type == 'IterBasedTrainLoop'
        assert cfg.train_cfg.max_iters == entry['max_iters']
        num_iters = length = entry['max_iters']
        marks = [1499, 1500, 1501, 80000]
    sample = {
        *range(1600),
        *range(0, num_iters, 997),
        num_iters - 1,
        *(mark + k for mark in marks for k in (-1, 0, 1)),
    }
    groups = optim_wrapper_of(path).optimizer.param_groups
    initial = [group['lr'] for group in groups]
    # The schedulers treat groups alike, so the two extremes will do.
    bases = [min(initial), max(initial)]
    assert max(initial) == pytest.approx(entry['lr'])
    seen = learning_rates(cfg, stand_in(bases), length, num_iters, sample)
    worst = max(
        abs(rate / (base * published_factor(entry, iteration)) - 1)
        for iteration, rates in seen.items()
        for base, rate in zip(bases, rates)
    )
    record_property('largest_relative_deviation', worst)
    assert worst < 1e-6


def test_test_settings(recipe):
    entry, path = recipe
    model = model_of(path)
    if entry['task'] == 'coco':
        assert model.test_cfg == shipped(path).model.test_cfg
        return
    single = entry['test']['single_scale']
    assert model.test_cfg.mode == single['mode'] == 'slide'
    assert list(model.test_cfg.crop_size) == single['crop_size']
    assert list(model.test_cfg.stride) == single['stride']
    assert list(model.data_preprocessor.size) == entry['crop_size']
    crops = [
        list(step.crop_size)
        for step in pipeline(load(path), 'train')
        if hasattr(step, 'crop_size')
    ]
    assert crops == [entry['crop_size']]


def pipeline(cfg, split):
    """The built transforms of a split's data set."""
    init_default_scope(cfg.default_scope)
    steps = cfg[f'{split}_dataloader'].dataset.pipeline
    return Compose([step.to_dict() for step in steps]).transforms


def shipped(path):
    """The framework's own config of the same kind."""
    cfg = load(path)
    folder = SHIPPED[cfg.default_scope]
    if cfg.default_scope == 'mmdet':
        start = (
            'mask-rcnn_convnext-t'
            if cfg.model.type == 'MaskRCNN'
            else 'cascade-mask-rcnn_convnext-t'
        )
        found = list(folder.glob(f'{start}-*.py'))
    else:
        size = cfg.model.data_preprocessor.size[0]
        found = list(
            folder.glob(f'convnext-{cfg.model.backbone.arch}_*{size}x{size}.py')
        )
    assert len(found) == 1
    return Config.fromfile(found[0], import_custom_modules=False)


def without_scope(node):
    """Without the mark that MMEngine leaves on inherited settings."""
    if isinstance(node, dict):
        return {k: without_scope(v) for k, v in node.items() if k != '_scope_'}
    return node


def plain(value):
    """Whether a setting can be compared by value."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if isinstance(value, dict):
        return all(map(plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))


def facts(model):
    """Settings of all modules beside the backbone, and of their helpers that
    are no modules (coders, samplers, anchor generators)."""
    found = {}
    for name, module in model.named_modules():
        if name.startswith('backbone'):
            continue
        for key, value in vars(module).items():
            if key.startswith('_') or key in ('init_cfg', 'training'):
                continue
            where = f'{name}.{key}'
            if plain(value):
                found[where] = value
            elif type(value).__module__.startswith('mm'):
                found[where] = (
                    type(value).__name__,
                    {k: v for k, v in vars(value).items() if plain(v)},
                )
    for name, param in model.named_parameters():
        if not name.startswith('backbone'):
            found[name] = tuple(param.shape)
    return found


def test_all_else_is_the_frameworks(recipe):
    """Heads, RPN, proposals, losses and pipelines that recipes.json does not
    hold are those of the shipped configs, but for the dtype and the layout of
    what RoIAlign gets."""
    entry, path = recipe
    cfg, reference = load(path), shipped(path)
    if entry['task'] == 'ade20k' or entry['arch'] == 'tiny':
        reference.model.backbone = cfg.model.backbone
        ours, theirs = facts(model_of(path)), facts(build_model(reference))
        ours.pop('.test_cfg'), theirs.pop('.test_cfg')
        assert len(ours) > 100 and ours == theirs
    if entry['task'] == 'coco':
        from convnext_mm.models.roi_extractor import SingleRoIExtractor

        assert issubclass(SingleRoIExtractor, mmdet.models.SingleRoIExtractor)
        extractors = [
            module
            for module in model_of(path).modules()
            if isinstance(module, mmdet.models.BaseRoIExtractor)
        ]
        assert len(extractors) == (2 if entry['method'] == 'mask_rcnn' else 6)
        assert {type(e) for e in extractors} == {SingleRoIExtractor}
    for split in ('train', 'val', 'test'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            theirs = pipeline(reference, split)
        for step in theirs:  # said twice, by the data set and by the step
            if hasattr(step, 'reduce_zero_label'):
                step.reduce_zero_label = None
        assert list(map(repr, pipeline(cfg, split))) == list(map(repr, theirs))
        ours, theirs = (
            without_scope(c[f'{split}_dataloader'].to_dict()) for c in (cfg, reference)
        )
        ours['dataset'].pop('pipeline'), theirs['dataset'].pop('pipeline')
        assert ours == theirs
    assert cfg.val_evaluator.type == reference.val_evaluator.type


def test_parameters_and_flops(recipe):
    entry, path = recipe
    cfg, paper = load(path), entry['paper']
    assert default_shape(cfg) == tuple(paper['flops_input'])
    cost = total(count(model_of(path), paper['flops_input']))
    assert round(cost.params / 1e6) == paper['params_M']
    assert cost.flops / 1e9 == pytest.approx(paper['flops_G'], rel=0.01)


V2 = [path for path in RECIPES if '-v2-' in path]


@pytest.mark.parametrize(
    'path',
    V2,
    ids=lambda p: Path(p).name.split('_')[0] + '-' + Path(p).name.split('_')[1],
)
def test_v2_recipes(path):
    """V2 blocks have GRN and no layer scale; GRN decays nowhere."""
    backbone = model_of(path).backbone
    blocks = [block for stage in backbone.stages for block in stage]
    assert all(b.grn is not None and b.gamma is None for b in blocks)
    decay = {
        name: group['weight_decay']
        for group in optim_wrapper_of(path).optimizer.param_groups
        for name in group['param_names']
    }
    grn = [name for name in decay if '.grn.' in name]
    assert len(grn) == 2 * len(blocks) and not any(decay[n] for n in grn)
    assert decay['backbone.stages.0.0.pwconv1.weight'] == 0.05


def test_v2_batch_of_32():
    for path in V2:
        size = load(path).train_dataloader.batch_size
        assert size == (4 if '-lsj-' in path else 2)
        assert load(path).auto_scale_lr.base_batch_size == 8 * size


@pytest.mark.parametrize(
    'path',
    [
        p
        for p in RECIPES
        if 'imagenet' not in p and p not in V2 and ('-dinov3-' in p or '-clip-' in p)
    ],
    ids=lambda p: Path(p).name.split('_')[0] + Path(p).name.split('_')[1],
)
def test_other_initial_weights(path):
    cfg = load(path)
    optim_wrapper_of(path)  # the layer count fits the depths
    preprocessor = model_of(path).data_preprocessor
    expected = (
        [122.771, 116.746, 104.094] if '-clip-' in path else [123.675, 116.28, 103.53]
    )
    np.testing.assert_allclose(
        preprocessor.mean_value
        if hasattr(preprocessor, 'mean_value')
        else cfg.model.data_preprocessor.mean,
        expected,
    )
    checkpoint = cfg.model.backbone.init_cfg.checkpoint
    assert checkpoint.startswith(('hf://facebook/dinov3-', 'timm://convnext'))
