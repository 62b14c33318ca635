"""Counting of parameters and FLOPs, and the tool that prints them."""

from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from torch import nn

from convnext_mm import ConvNeXt
from convnext_mm.analysis.complexity import Cost, count, default_shape, measure, total
from recipe_models import RECIPES, model_of
from repo import ROOT, load_tool

MASK_RCNN = next(
    p for p in RECIPES if 'mask-rcnn_convnext-t_fpn_8xb2' in p and 'cascade' not in p
)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.decode_head = nn.Linear(8, 5)
        self.auxiliary_head = nn.Linear(8, 2)

    def forward(self, x, samples=None, mode='tensor'):
        x = self.backbone(x).permute(0, 2, 3, 1)
        return self.decode_head.forward(x)  # not through its hooks


def test_multiply_accumulates_and_training_only_parts():
    costs = count(Toy(), (4, 6))
    assert costs == {
        'backbone': Cost(3 * 8 * 9, 3 * 8 * 9 * 24),
        'decode_head': Cost(8 * 5 + 5, 8 * 5 * 24),
        'auxiliary_head': Cost(8 * 2 + 2, 0),
    }
    assert total(costs) == (216 + 45 + 18, 24 * (216 + 40))


def test_shared_parameters_count_once():
    toy = Toy()
    toy.auxiliary_head.weight = nn.Parameter(torch.zeros(2, 8))
    toy.decode_head = toy.auxiliary_head
    assert total(count(toy, (4, 6))).params == 216 + 18


def test_parts_of_a_detector():
    costs = count(model_of(MASK_RCNN), (800, 1280))
    shown = [name for name, cost in costs.items() if cost != (0, 0)]
    assert shown == [
        'backbone',
        'neck',
        'rpn_head',
        'roi_head.bbox_head',
        'roi_head.mask_head',
    ]
    half = count(model_of(MASK_RCNN), (800, 640))
    # Boxes and masks do not depend on the image.
    assert half['roi_head.bbox_head'] == costs['roi_head.bbox_head']
    assert half['neck'].flops * 2 == costs['neck'].flops


def retinanet(**backbone):
    cfg = Config.fromfile(
        Path(mmdet.__file__).parent / '.mim/configs/retinanet'
        '/retinanet_r50_fpn_1x_coco.py'
    )
    cfg.model.backbone = dict(type='convnext_mm.ConvNeXt', **backbone)
    cfg.model.neck.in_channels = [40, 80, 160, 320]
    return cfg


def test_detector_of_one_stage():
    costs = measure(retinanet(arch='atto'), (128, 128))
    assert list(costs) == ['backbone', 'neck', 'bbox_head']
    assert all(min(cost) > 0 for cost in costs.values())


def test_model_that_needs_numbers(monkeypatch):
    """What does not run on the meta device runs on the CPU."""
    cfg = retinanet(arch='atto')
    expected = measure(cfg, (64, 64))
    original = ConvNeXt.forward

    def needs_numbers(self, x):
        outs = original(self, x)
        outs[0].sum().item()
        return outs

    monkeypatch.setattr(ConvNeXt, 'forward', needs_numbers)
    assert measure(cfg, (64, 64)) == expected


def test_unknown_kind():
    with pytest.raises(ValueError, match='--shape H W'):
        default_shape(Config(dict(default_scope='mmaction')))


def test_model_that_does_not_run():
    with pytest.raises(ValueError, match='Toy does not run on a plain image of 2 x 3'):
        model = Toy()
        model.decode_head = nn.Linear(7, 5)
        count(model, (2, 3))


def test_tool(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('COLUMNS', '120')
    tool = load_tool('get_flops')
    tool.main([MASK_RCNN])
    out = capsys.readouterr().out
    rows = [line.replace('│', ' ').split() for line in out.splitlines()]
    assert ['backbone', '27.82', '90.9'] in rows
    assert ['total', '48.10', '261.9'] in rows
    with pytest.raises(SystemExit, match='error: config .* does not exist'):
        tool.main(['configs/none.py'])
