"""Detectors and segmentors around the backbone: memory layouts and bfloat16."""

import copy
import math

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from convnext_mm.engine.optimizers import amp
from recipe_models import cut_down, load, recipe

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
RECIPES = {
    'mask_rcnn': recipe('mask-rcnn_convnext-t_'),
    'cascade': recipe('cascade', 'convnext-t_'),
    'upernet': recipe('convnext-tiny_upernet'),
}
SIZE = (64, 64)  # of images for segmentors, whose 150 logits are as large


def build(name, **backbone):
    cfg = load(RECIPES[name])
    init_default_scope(cfg.default_scope)
    settings = cut_down(cfg)
    settings.backbone.update(drop_path_rate=0.0, **backbone)
    if name == 'upernet':  # what is drawn for it depends on the layout
        for head in (settings.decode_head, settings.auxiliary_head):
            head.dropout_ratio = 0
        settings.data_preprocessor.size = SIZE  # it pads to that
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(settings))
    model.init_weights()
    return cfg, model.train()


def batch_for(cfg):
    """Two images with annotations, as a loader gives them."""
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, [(3, 128, 128)] * 2, [3, 2], num_classes=80, with_mask=True
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    return pseudo_collate(
        [
            dict(
                inputs=torch.randint(
                    255, (3, *SIZE), dtype=torch.uint8, generator=generator
                ),
                data_samples=SegDataSample(
                    gt_sem_seg=PixelData(
                        data=torch.randint(150, (1, *SIZE), generator=generator)
                    ),
                    metainfo=dict(img_shape=SIZE, ori_shape=SIZE),
                ),
            )
            for _ in range(2)
        ]
    )


def losses_of(model, cfg):
    torch.manual_seed(0)
    data = model.data_preprocessor(batch_for(cfg), training=True)
    torch.manual_seed(0)  # of the proposals to learn from
    loss, log = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    return {k: float(v.detach()) for k, v in log.items() if 'loss' in k}


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_layouts_give_equal_losses(name):
    """Ours hand channels-last maps over; only RoIAlign gets a copy."""
    losses, gradients = [], []
    for layout in ('channels_last', 'contiguous'):
        cfg, model = build(name, out_layout=layout)
        assert cfg.model.backbone.out_layout == 'channels_last'
        losses.append(losses_of(model, cfg))
        gradients.append(model.backbone.stages[0][0].pwconv1.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    scale = gradients[1].abs().max()
    assert scale > 0
    assert (gradients[0] - gradients[1]).abs().max() < 1e-2 * scale


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade'])
def test_necks_keep_the_layout(name):
    _cfg, model = build(name)
    maps = model.neck(model.backbone(torch.rand(2, 3, 128, 128)))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.slow
@pytest.mark.parametrize('name', RECIPES)
def test_a_step_in_bf16(name, monkeypatch):
    """As the recipe says, on a device with bfloat16: here the CPU."""
    monkeypatch.setattr(amp, 'has_bf16', lambda device: True)
    cfg, model = build(name)
    assert cfg.optim_wrapper.type == 'convnext_mm.AmpOptimWrapper'
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    seen = []
    last = model.decode_head.conv_seg if name == 'upernet' else model.neck.fpn_convs[0]
    last.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    before = copy.deepcopy(model.state_dict())
    log = model.train_step(batch_for(cfg), wrapper)
    assert all(math.isfinite(v) for k, v in log.items() if 'loss' in k)
    assert seen == [torch.bfloat16]
    after = model.state_dict()
    assert all(v.isfinite().all() for v in after.values() if v.is_floating_point())
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64]
)
def test_roi_extractor(dtype):
    """Any layout and dtype gives MMDetection's features of the same values."""
    from mmdet.models import SingleRoIExtractor

    settings = dict(
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
        out_channels=8,
        featmap_strides=[4, 8],
    )
    ours = MODELS.build(dict(type='convnext_mm.SingleRoIExtractor', **settings))
    torch.manual_seed(0)
    maps = [torch.rand(2, 8, 64 // i, 64 // i).to(dtype) for i in (1, 2)]
    rois = torch.tensor(
        [[0, 3.3, 4.7, 101.1, 77.7], [1, 10, 8, 60, 50], [1, 1.5, 2.5, 250, 251]]
    )
    exact = torch.promote_types(dtype, torch.float32)
    expected = SingleRoIExtractor(**settings)([m.to(exact) for m in maps], rois)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [
            m.detach().contiguous(memory_format=layout).requires_grad_() for m in maps
        ]
        features = ours(given, rois)
        assert torch.equal(features, expected) and features.dtype == exact
        features.sum().backward()
        assert all(m.grad.dtype == dtype and m.grad.abs().sum() > 0 for m in given)
