"""configs/custom: every example is built, trained one step and run once."""

import shutil
from importlib import import_module

import pytest
import torch

from convnext_mm import ConvNeXt
from convnext_mm.datasets import write_shapes
from recipe_models import FEW_PROPOSALS, toy, train_and_run
from repo import ROOT, tool

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
FOLDER = ROOT / 'configs' / 'custom'
DETR = {'encoder.num_layers': 1, 'decoder.num_layers': 2, 'num_queries': 20}
MASK2FORMER = {
    'num_queries': 10,
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 1,
}
MASK2FORMER_ADE = {f'decode_head.{k}': v for k, v in MASK2FORMER.items()}
MASK2FORMER_COCO = {
    'data_preprocessor.batch_augments': None,
    'test_cfg.max_per_image': 10,
    **{f'panoptic_head.{k}': v for k, v in MASK2FORMER.items()},
}
MASK_RCNN = {'data_preprocessor.batch_augments': None, **FEW_PROPOSALS}
CASCADE = {
    **{k: v for k, v in FEW_PROPOSALS.items() if 'rcnn' not in k},
    'roi_head.mask_head.conv_out_channels': 16,
}
for stage in range(3):
    CASCADE[f'train_cfg.rcnn.{stage}.sampler.num'] = 16
    CASCADE[f'roi_head.bbox_head.{stage}.conv_out_channels'] = 16
    CASCADE[f'roi_head.bbox_head.{stage}.fc_out_channels'] = 32
UPERNET = {
    'test_cfg.mode': 'whole',
    'decode_head.channels': 16,
    'auxiliary_head.channels': 16,
}
LINEAR = {'decode_head.channels': 112, 'test_cfg.mode': 'whole'}
ONE_GPU_CASCADE = (
    'cascade-mask-rcnn_convnext-b-in22k-pre_fpn_4conv1fc-giou_'
    '1xb2-accum8-amp-ms-crop-3x_coco.py'
)
ONE_GPU_UPERNET = (
    'convnext-base-in22k-pre_upernet_1xb4-accum4-amp-160k_ade20k-640x640.py'
)
PYRAMID = 'mask-rcnn_{}-pre_simple-pyramid_8xb4-amp-lsj-3x_coco.py'
# What makes the model small: settings below `model`.
SMALL = {
    'atss_convnext-t_fpn_1x_coco.py': {},
    ONE_GPU_CASCADE: CASCADE,
    ONE_GPU_UPERNET: UPERNET,
    'convnext-tiny-dinov3-pre_8xb32-linear-coslr-100e_in1k.py': {},
    'convnext-tiny-dinov3-pre_linear_8xb2-40k_ade20k-512x512.py': LINEAR,
    'convnext-v2-tiny-fcmae-pre_8xb32-linear-coslr-100e_in1k.py': {},
    'convnext-v2-tiny-fcmae-pre_linear_8xb2-40k_ade20k-512x512.py': LINEAR,
    'deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py': {
        'decode_head.channels': 64,
        'auxiliary_head.channels': 32,
    },
    'dino-4scale_convnext-t-dinov3-pre_8xb2-12e_coco.py': DETR,
    'dino-4scale_convnext-t_8xb2-12e_coco.py': DETR,
    'dino-4scale_convnext-v2-t-fcmae-pre_8xb2-12e_coco.py': DETR,
    'faster-rcnn_convnext-t_fpn_1x_coco.py': FEW_PROPOSALS,
    'fcos_convnext-t_fpn_gn-head_1x_coco.py': {},
    'fpn_convnext-t_4xb4-160k_ade20k-512x512.py': {},
    PYRAMID.format('convnext-t-d16-dinov3'): MASK_RCNN,
    PYRAMID.format('convnext-v2-t-d16-fcmae'): MASK_RCNN,
    'mask-rcnn_convnext-t-dinov3-pre-frozen_fpn_8xb2-amp-ms-crop-3x_coco.py': MASK_RCNN,
    'mask2former_convnext-t-dinov3-pre_8xb2-160k_ade20k-512x512.py': MASK2FORMER_ADE,
    'mask2former_convnext-t-dinov3-pre_8xb2-lsj-50e_coco.py': MASK2FORMER_COCO,
    'mask2former_convnext-t_8xb2-160k_ade20k-512x512.py': MASK2FORMER_ADE,
    'mask2former_convnext-t_8xb2-lsj-50e_coco.py': MASK2FORMER_COCO,
    'mask2former_convnext-v2-t-fcmae-pre_8xb2-lsj-50e_coco.py': MASK2FORMER_COCO,
    'mask2former_convnext-v2-t_8xb2-160k_ade20k-512x512.py': MASK2FORMER_ADE,
    'ms-rcnn_convnext-t_fpn_1x_coco.py': FEW_PROPOSALS,
    'retinanet_convnext-t_fpn_1x_coco.py': {},
    'segformer_convnext-t_8xb2-160k_ade20k-512x512.py': {},
}
# Of libraries that set-up does not install; these need operators, too.
ROTATED = {
    'oriented-rcnn-le90_convnext-t_fpn_1x_dota.py': FEW_PROPOSALS,
    'rotated-retinanet-rbox-le90_convnext-t_fpn_1x_dota.py': {},
}
POSE = 'td-hm_convnext-t_8xb64-210e_coco-256x192.py'
OWN_DATA = (
    'own-coco-data_mask-rcnn_convnext-t.py',
    'own-mask-folder_upernet_convnext-t.py',
)


def test_every_example_is_tested():
    names = {path.name for path in FOLDER.glob('*.py')}
    own = {name for name in names if name.startswith('own-')}
    assert names - own == {*SMALL, *ROTATED, POSE}
    assert own >= {*OWN_DATA}


@pytest.mark.parametrize('name', SMALL)
def test_example(name):
    cfg = toy(FOLDER / name, SMALL[name])
    assert cfg.model.backbone.type == 'convnext_mm.ConvNeXt'
    if 'accum' in name:
        cfg.optim_wrapper.accumulative_counts = 2  # for time's sake
    model, *_ = train_and_run(cfg)
    assert isinstance(model.backbone, ConvNeXt)


def test_deeplab_at_8():
    name = 'deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py'
    train_and_run(
        toy(
            FOLDER / name,
            {
                **SMALL[name],
                'backbone.output_stride': 8,
                'decode_head.dilations': (1, 12, 24, 36),
            },
        )
    )


def need(library):
    """Skips where a library is missing or broken, with what its import says."""
    try:
        import_module(f'{library}.models')
    except (ImportError, ValueError) as error:
        pytest.skip(f'needs {library}: {error}')


@pytest.mark.slow
@pytest.mark.parametrize('name', ROTATED)
def test_rotated_detection(name):
    need('mmrotate')
    from mmcv.ops import box_iou_rotated

    try:
        box_iou_rotated(torch.ones(1, 5), torch.ones(1, 5))
    except NotImplementedError as error:
        pytest.skip(f'needs compiled operators of mmcv: {error}')
    model, _, results = train_and_run(toy(FOLDER / name, ROTATED[name]))
    assert isinstance(model.backbone, ConvNeXt)
    assert results[0].pred_instances.bboxes.shape[1] == 5


def test_pose():
    need('mmpose')
    model, _, results = train_and_run(toy(FOLDER / POSE, {'head.in_channels': 40}))
    assert isinstance(model.backbone, ConvNeXt)
    assert results[0].pred_instances.keypoints.shape[1:] == (17, 2)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    """The layouts that the two examples for own data assume."""
    drawn = tmp_path_factory.mktemp('drawn')
    write_shapes(drawn, num_train=6, num_val=3, size=96)
    out = tmp_path_factory.mktemp('own')
    for ours, split in (('train', 'training'), ('val', 'validation')):
        shutil.copytree(drawn / 'images' / split, out / ours)
        shutil.copytree(drawn / 'images' / split, out / 'images' / ours)
        shutil.copytree(drawn / 'annotations' / split, out / 'annotations' / ours)
        shutil.copy(
            drawn / 'annotations' / f'instances_{split}.json', out / f'{ours}.json'
        )
    return out


QUICK = (
    'env_cfg.mp_cfg.mp_start_method=fork',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'model.backbone.init_cfg=None',
    'model.backbone.arch=atto',
)
OWN_DATA_OPTIONS = {
    OWN_DATA[0]: (
        'model.neck.in_channels=[40,80,160,320]',
        'max_epochs=1',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=3',
        'train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[(64,128)]',
        'train_dataloader.dataset.pipeline.3.transforms.1.0.scales=[(96,128)]',
        'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size=(48,64)',
        'train_dataloader.dataset.pipeline.3.transforms.1.2.scales=[(64,128)]',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
        *(f'model.{k}={v}' for k, v in FEW_PROPOSALS.items()),
    ),
    OWN_DATA[1]: (
        'img_suffix=.png',
        'train_dataloader.dataset.img_suffix=.png',
        'val_dataloader.dataset.img_suffix=.png',
        'model.decode_head.in_channels=[40,80,160,320]',
        'model.decode_head.channels=16',
        'model.auxiliary_head.in_channels=160',
        'model.auxiliary_head.channels=16',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
        'model.data_preprocessor.size=(64,64)',
        'train_dataloader.dataset.pipeline.2.scale=(96,96)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)',
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', OWN_DATA)
def test_own_data(name, shapes, tmp_path):
    tool(
        'train',
        f'configs/custom/{name}',
        '--data-root',
        shapes,
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *QUICK,
        *OWN_DATA_OPTIONS[name],
    )
    assert list(tmp_path.glob('best_*.pth'))
