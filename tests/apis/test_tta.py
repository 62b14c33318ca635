"""tools/test.py --tta gives the published multi-scale protocol."""

import json

import mmcv
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope

from convnext_mm.apis import test
from recipe_models import RECIPES, load
from repo import ROOT, parsed

UPERNET = [path for path in RECIPES if 'upernet' in path]
BASIC = 'configs/upernet/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'
LARGE = (
    'configs/upernet/convnext-base-in22k-pre_upernet_8xb2-amp-160k_ade20k-640x640.py'
)
PUBLISHED = json.loads((ROOT / 'tests/data/recipes.json').read_text())['segmentation']
MULTI_SCALE = PUBLISHED[0]['test']['multi_scale']
# A network that runs in seconds.
SMALL = (
    'model.backbone.arch=atto',
    'model.backbone.init_cfg=None',
    'model.decode_head.in_channels=[40,80,160,320]',
    'model.decode_head.channels=8',
    'model.decode_head.num_classes=8',
    'model.auxiliary_head.num_classes=8',
    'model.decode_head.norm_cfg.type=BN',
    'model.auxiliary_head.norm_cfg.type=BN',
    'model.auxiliary_head.in_channels=160',
)


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    checkpoint = tmp_path / 'weights.pth'
    torch.save({}, checkpoint)
    monkeypatch.setattr(test, 'check_data', lambda *_: None)

    def run(config, *options):
        args = parsed('test', config, checkpoint, *options)
        # They concern what comes after.
        for name in ('out', 'deploy', 'corruptions', 'severities'):
            del args[name]
        return test.prepare(**args)

    return run


def test_settings(prepare):
    """The ratios are of the test scale, the whole image at once."""
    assert all(e['test']['multi_scale'] == MULTI_SCALE for e in PUBLISHED)
    for path, size in ((BASIC, 512), (LARGE, 640)):
        cfg = prepare(path, '--tta')
        assert cfg.model.type == 'SegTTAModel'
        assert cfg.model.module.type == 'EncoderDecoder'
        assert cfg.model.module.test_cfg.mode == MULTI_SCALE['mode']
        init_default_scope('mmseg')
        dataset = cfg.test_dataloader.dataset
        dataset = DATASETS.build(dict(dataset, lazy_init=True))
        augment = dataset.pipeline.transforms[1]
        found = [
            (s.transforms[0].scale, s.transforms[1].prob) for s in augment.subroutines
        ]
        assert found == [
            ((int(4 * size * ratio), int(size * ratio)), flip)
            for ratio in MULTI_SCALE['ratios']
            for flip in ((0.0, 1.0) if MULTI_SCALE['flip'] else (0.0,))
        ]
        assert prepare(path).model.test_cfg.mode == 'slide'


def test_every_segmentation_recipe_has_it():
    for path in UPERNET:
        cfg = load(path)
        assert cfg.tta_model.type == 'SegTTAModel'
        scales = cfg.tta_pipeline[1].transforms[0]
        assert len(scales) == (5 if '-v2-' in path else 6)


def test_a_config_without_it(prepare):
    path = next(path for path in RECIPES if 'mask_rcnn' in path)
    with pytest.raises(ValueError, match='tta_model and tta_pipeline.*' + path):
        prepare(path, '--tta')


def test_detector_settings_are_used(prepare):
    path = next(path for path in RECIPES if 'mask_rcnn' in path)
    cfg = prepare(
        path,
        '--tta',
        '--cfg-options',
        'tta_model.type=DetTTAModel',
        'tta_pipeline=[dict(type="LoadImageFromFile")]',
    )
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == 'MaskRCNN'
    assert len(cfg.test_dataloader.dataset.pipeline) == 1


@pytest.mark.slow
@torch.no_grad()
def test_prediction_is_the_published_average(prepare, shared_dir):
    """A real image: softmax scores averaged over 6 scales x 2 flips."""
    cfg = prepare(BASIC, '--tta', '--cfg-options', *SMALL)
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    inner = model.module
    for norm in inner.modules():  # as if trained: not the same everywhere
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
    cfg.test_dataloader.dataset.data_root = str(shared_dir / 'data/ade20k_sample')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    sample = dataset[0]
    # No class before others: some pixels for each of many.
    some = torch.rand(1, 3, 256, 256)
    scores = inner.encode_decode(some, [dict(img_shape=(256, 256))])
    inner.decode_head.conv_seg.bias -= scores.mean((0, 2, 3))
    result = model.test_step(pseudo_collate([sample]))[0]

    image = mmcv.imread(dataset.get_data_info(0)['img_path'])
    height, width = image.shape[:2]
    mean, std = (
        np.array(cfg.model.module.data_preprocessor[key]) for key in ('mean', 'std')
    )
    scores = 0
    for ratio in MULTI_SCALE['ratios']:
        resized = mmcv.imrescale(image, (int(2048 * ratio), int(512 * ratio)))
        x = (resized[..., ::-1] - mean) / std
        x = torch.tensor(x, dtype=torch.float).permute(2, 0, 1)[None]
        for flip in (False, True):
            logits = inner.encode_decode(
                x.flip(3) if flip else x, [dict(img_shape=x.shape[2:])]
            )
            logits = logits.flip(3) if flip else logits
            logits = F.interpolate(
                logits, (height, width), mode='bilinear', align_corners=False
            )
            scores = scores + logits.softmax(1)
    expected = scores[0].argmax(0)
    found = result.pred_sem_seg.data.squeeze()
    assert found.shape == expected.shape == (height, width)
    assert len(expected.unique()) > 3
    assert (found == expected).float().mean() > 0.9999
    assert result.gt_sem_seg.data.shape[-2:] == (height, width)
