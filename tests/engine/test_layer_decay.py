"""Layer ids and the optimizer wrapper constructor."""

import copy
import importlib
import json
import logging
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from convnext_mm import ConvNeXt
from convnext_mm.models.layer_id import default_num_layers, get_layer_id

CONSTRUCTOR = 'convnext_mm.LayerDecayOptimWrapperConstructor'
SMALL = dict(depths=[1, 1, 5, 1], channels=[8, 16, 24, 32])


class Model(nn.Module):
    def __init__(self, backbone=None, **settings):
        super().__init__()
        self.backbone = backbone or ConvNeXt(SMALL, **settings)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def build(model, paramwise_cfg=None, constructor=CONSTRUCTOR, **settings):
    cfg = dict(
        type='OptimWrapper',
        constructor=constructor,
        optimizer=dict(type='AdamW', lr=1e-2, betas=(0.9, 0.999), weight_decay=0.05),
        paramwise_cfg=dict(decay_rate=0.7) if paramwise_cfg is None else paramwise_cfg,
    )
    cfg.update(settings)
    return build_optim_wrapper(model, cfg)


def settings_by_name(model, optim_wrapper):
    """(lr, weight decay) of every parameter, by its name."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in optim_wrapper.optimizer.param_groups
        for p in group['params']
    }


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_published_layer_ids(data_dir, arch, decay_type):
    facts = json.loads((data_dir / 'layer_ids.json').read_text())[arch]
    assert len(facts[decay_type]) > 100
    for name, layer_id in facts[decay_type].items():
        assert get_layer_id(name, facts['num_layers'], decay_type) == layer_id, name


@pytest.mark.parametrize(
    'depths, num_layers',
    [
        ((2, 2, 6, 2), 6),
        ((3, 3, 9, 3), 6),
        ((3, 3, 10, 3), 12),
        ((3, 3, 27, 3), 12),
        ((3, 4, 30, 3), 13),
        ((3, 3, 60, 3), 23),
    ],
)
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_default_num_layers_never_scales_above_1(depths, num_layers, decay_type):
    assert default_num_layers(depths) == num_layers
    last = f'backbone.stages.2.{depths[2] - 1}.norm.weight'
    assert get_layer_id(last, num_layers, decay_type) <= num_layers


def shipped_model(library, name):
    # Not MMEngine's get_config('mmseg::...'): it does not know that
    # onedl-mmsegmentation brings mmseg and installs another one over it.
    folder = Path(importlib.import_module(library).__file__).parent
    return Config.fromfile(
        folder / '.mim' / 'configs' / '_base_' / 'models' / f'{name}.py'
    ).model


def detector(backbone_type='convnext_mm.ConvNeXt', use_grn=False):
    cfg = shipped_model('mmdet', 'mask-rcnn_r50_fpn')
    cfg.backbone = dict(
        type=backbone_type,
        arch='atto',
        use_grn=use_grn,
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
    )
    cfg.neck.in_channels = [40, 80, 160, 320]
    init_default_scope('mmdet')
    from mmdet.registry import MODELS

    return MODELS.build(cfg)


def segmentor(backbone_type='convnext_mm.ConvNeXt', use_grn=False):
    pytest.importorskip('mmpretrain.models')  # the shipped config imports it
    cfg = shipped_model('mmseg', 'upernet_convnext')
    cfg.backbone = dict(
        type=backbone_type,
        arch='atto',
        use_grn=use_grn,
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
    )
    cfg.data_preprocessor.size = (64, 64)
    cfg.decode_head.update(in_channels=[40, 80, 160, 320], channels=16, num_classes=5)
    cfg.auxiliary_head.update(in_channels=160, channels=16, num_classes=5)
    init_default_scope('mmseg')
    from mmseg.registry import MODELS

    return MODELS.build(cfg)


THEIRS = {
    detector: 'mmdet.LearningRateDecayOptimizerConstructor',
    segmentor: 'mmseg.LearningRateDecayOptimizerConstructor',
}


@pytest.mark.parametrize('num_layers', [6, 12])
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('make', THEIRS)
def test_equals_the_head_librarys_constructor(make, use_grn, decay_type, num_layers):
    model = make(use_grn=use_grn)
    cfg = dict(decay_rate=0.7, decay_type=decay_type, num_layers=num_layers)
    ours = settings_by_name(model, build(model, cfg))
    theirs = settings_by_name(model, build(model, cfg, THEIRS[make]))
    assert len(ours) == len(list(model.parameters()))
    assert set(ours) == set(theirs)
    grn = 0
    for name, (lr, weight_decay) in ours.items():
        assert lr == pytest.approx(theirs[name][0], rel=1e-12), name
        if '.grn.' in name:
            assert weight_decay == 0, name
            grn += 1
        else:
            assert weight_decay == theirs[name][1], name
    assert grn == (24 if use_grn else 0)


def test_serves_an_mmpretrain_backbone_with_its_own_count():
    pytest.importorskip('mmpretrain.models')
    model = detector('mmpretrain.ConvNeXt')
    found = settings_by_name(model, build(model))
    assert found['backbone.downsample_layers.0.0.weight'][0] == pytest.approx(
        1e-2 * 0.7**7
    )
    assert found['backbone.stages.2.5.pointwise_conv1.weight'] == (
        pytest.approx(1e-2 * 0.7**3),
        0.05,
    )
    assert found['rpn_head.rpn_conv.weight'] == (1e-2, 0.05)
    build(model, dict(decay_rate=0.7, num_layers=6))
    with pytest.raises(ValueError, match='num_layers=12.*counts 6'):
        build(model, dict(decay_rate=0.7, num_layers=12))
    with pytest.raises(ValueError, match='stage_wise.*layer_wise'):
        build(model, dict(decay_rate=0.7, decay_type='stage_wise'))


def test_frozen_parameters_are_left_out():
    model = Model(frozen_stages=2)
    found = settings_by_name(model, build(model))
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any('stages.1.' in n or 'downsample_layers.1.' in n for n in found)


def test_shared_parameters_are_counted_once():
    model = Model()
    model.twin = model.head
    groups = build(model).optimizer.param_groups
    params = [p for group in groups for p in group['params']]
    assert len(params) == len(set(map(id, params)))


def test_custom_keys_multiply():
    model = Model()
    plain = settings_by_name(model, build(model))
    custom = settings_by_name(
        model,
        build(
            model,
            dict(
                decay_rate=0.7,
                norm_decay_mult=0.0,
                custom_keys={
                    'backbone': dict(lr_mult=0.5),
                    'backbone.stages.3': dict(lr_mult=2.0, decay_mult=0.1),
                },
            ),
        ),
    )
    for name, (lr, weight_decay) in custom.items():
        factor = 2 if 'stages.3' in name else 0.5 if 'backbone' in name else 1
        assert lr == pytest.approx(factor * plain[name][0]), name
        factor = 0.1 if 'stages.3' in name else 1
        assert weight_decay == pytest.approx(factor * plain[name][1]), name


def test_logs_one_compact_table(caplog):
    logger = MMLogger.get_instance('layer_decay_test', logger_name='test')
    logger.addHandler(caplog.handler)
    model = Model()
    with caplog.at_level(logging.INFO, logger='layer_decay_test'):
        groups = build(model).optimizer.param_groups
    lines = '\n'.join(r.getMessage() for r in caplog.records).splitlines()
    assert len(lines) < 30 and len(groups) > 10
    row = next(line for line in lines if line.startswith('layer_0_decay'))
    assert row.split() == ['layer_0_decay', '0.0824', '0.05', '1', '384']


def test_gradient_accumulation_and_step():
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    whole = build(model)
    parts = build(twin, accumulative_counts=2)
    x, y = torch.rand(8, 3, 32, 32), torch.randint(5, (8,))
    loss = nn.functional.cross_entropy
    whole.update_params(loss(model(x), y))
    with parts.optim_context(twin):
        for i in (0, 4):
            parts.update_params(loss(twin(x[i : i + 4]), y[i : i + 4]))
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4, msg=name)


def test_a_wrapped_model_is_unwrapped():
    model = Model()
    wrapped = nn.Module()
    wrapped.module = model
    assert settings_by_name(model, build(wrapped)) == settings_by_name(
        model, build(model)
    )


@pytest.mark.parametrize(
    'cfg, error, words',
    [
        ({}, TypeError, ['decay_rate', 'None']),
        (dict(decay_rate='0.7'), TypeError, ['decay_rate', "'0.7'"]),
        (dict(decay_rate=0), ValueError, ['decay_rate', '(0, 1]', '0']),
        (dict(decay_rate=1.1), ValueError, ['decay_rate', '1.1']),
        (
            dict(decay_rate=0.7, decay_type='block'),
            ValueError,
            ['decay_type', "'block'", 'stage_wise'],
        ),
        (dict(decay_rate=0.7, num_layers=2), ValueError, ['num_layers=2', '3']),
        (
            dict(decay_rate=0.7, num_layers=0),
            ValueError,
            ['num_layers', 'at least 1', 'got 0'],
        ),
        (dict(decay_rate=0.7, num_layers=6.0), TypeError, ['num_layers', '6.0']),
        (
            dict(decay_rate=0.7, dwconv_decay_mult=0.0),
            ValueError,
            ['dwconv_decay_mult', 'custom_keys'],
        ),
        (
            dict(decay_rate=0.7, norm_decay_mult=1.0),
            ValueError,
            ['norm_decay_mult=1.0', '0'],
        ),
        (
            dict(decay_rate=0.7, custom_keys=dict(head=5)),
            TypeError,
            ["custom_keys['head']", 'lr_mult', '5'],
        ),
        (
            dict(decay_rate=0.7, custom_keys=dict(head=dict(lr_mult='a'))),
            TypeError,
            ["['lr_mult']", "'a'"],
        ),
        (
            dict(decay_rate=0.7, custom_keys=dict(head=dict(foo=1))),
            ValueError,
            ["'foo'", 'decay_mult'],
        ),
    ],
)
def test_bad_settings(cfg, error, words):
    with pytest.raises(error) as caught:
        build(Model(), {'bypass_duplicate': True, **cfg})
    for word in words:
        assert word in str(caught.value), caught.value


def test_models_that_cannot_be_served():
    with pytest.raises(ValueError, match='Linear has no backbone'):
        build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='the backbone Conv2d'):
        build(Model(nn.Conv2d(3, 32, 3)))
    with pytest.raises(ValueError, match='Model has no parameter to train'):
        build(Model().requires_grad_(False))
    with pytest.raises(ValueError, match='set lr'):
        build(Model(), optimizer=dict(type='AdamW', weight_decay=0.05))
