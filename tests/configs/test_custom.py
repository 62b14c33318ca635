"""configs/custom: every example is built, trained one step and run once."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

from convnext_mm import ConvNeXt
from convnext_mm.datasets import write_shapes
from convnext_mm.engine.launch import fit_to_device
from repo import ROOT, tool

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
FOLDER = ROOT / 'configs' / 'custom'
# The tiny's channels and those of the small arch that takes its place.
CHANNELS = dict(zip((96, 192, 384, 768), (16, 24, 32, 40)))
ARCH = dict(depths=(1, 1, 2, 1), channels=tuple(CHANNELS.values()))
DETR = {'encoder.num_layers': 1, 'decoder.num_layers': 2, 'num_queries': 20}
MASK2FORMER = {
    'num_queries': 10,
    'pixel_decoder.encoder.num_layers': 1,
    'transformer_decoder.num_layers': 1,
}
FEW_PROPOSALS = {
    'train_cfg.rpn_proposal.max_per_img': 50,
    'train_cfg.rcnn.sampler.num': 32,
    'test_cfg.rpn.max_per_img': 50,
}
SIZE = (64, 64)  # of images for segmentors, whose 150 logits are as large
# What makes the model small: settings below `model`.
SMALL = {
    'atss_convnext-t_fpn_1x_coco.py': {},
    'deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py': {
        'decode_head.channels': 64,
        'auxiliary_head.channels': 32,
    },
    'dino-4scale_convnext-t_8xb2-12e_coco.py': DETR,
    'faster-rcnn_convnext-t_fpn_1x_coco.py': FEW_PROPOSALS,
    'fcos_convnext-t_fpn_gn-head_1x_coco.py': {},
    'fpn_convnext-t_4xb4-160k_ade20k-512x512.py': {},
    'mask2former_convnext-t_8xb2-160k_ade20k-512x512.py': {
        f'decode_head.{k}': v for k, v in MASK2FORMER.items()
    },
    'mask2former_convnext-t_8xb2-lsj-50e_coco.py': {
        'data_preprocessor.batch_augments': None,
        'test_cfg.max_per_image': 10,
        **{f'panoptic_head.{k}': v for k, v in MASK2FORMER.items()},
    },
    'ms-rcnn_convnext-t_fpn_1x_coco.py': FEW_PROPOSALS,
    'retinanet_convnext-t_fpn_1x_coco.py': {},
    'segformer_convnext-t_8xb2-160k_ade20k-512x512.py': {},
}
OWN_DATA = (
    'own-coco-data_mask-rcnn_convnext-t.py',
    'own-mask-folder_upernet_convnext-t.py',
)


def swap_channels(node):
    """Puts the small arch's channels wherever a model takes the backbone's."""
    for key, value in node.items():
        if isinstance(value, dict):
            swap_channels(value)
        elif key in ('in_channels', 'c1_in_channels'):
            if isinstance(value, int):
                node[key] = CHANNELS.get(value, value)
            elif set(value) <= set(CHANNELS):
                node[key] = [CHANNELS[v] for v in value]


def load_small(name, **backbone):
    cfg = Config.fromfile(FOLDER / name)
    assert cfg.model.backbone.type == 'convnext_mm.ConvNeXt'
    swap_channels(cfg.model)
    cfg.model.backbone.update(arch=ARCH, init_cfg=None, **backbone)
    cfg.merge_from_dict({f'model.{k}': v for k, v in SMALL[name].items()})
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = SIZE  # it pads to that
    cfg.launcher = 'none'
    fit_to_device(cfg, 'cpu')
    return cfg


def build(cfg):
    DefaultScope.get_instance(str(id(cfg)), scope_name=cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        model.init_weights()
        assert isinstance(model.backbone, ConvNeXt)
        return model, build_optim_wrapper(model, cfg.optim_wrapper)


def inputs_for(cfg):
    """Two images with annotations, as a loader gives them."""
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2, [(3, 128, 128)] * 2, [3, 2], num_classes=80, with_mask=True
        )
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        labels = torch.randint(0, 6, (1, *SIZE), generator=generator)
        samples.append(
            SegDataSample(
                gt_sem_seg=PixelData(data=labels),
                metainfo=dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE),
            )
        )
    images = [
        torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    ]
    return dict(inputs=images, data_samples=samples)


def train_and_run(cfg):
    model, optim_wrapper = build(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model.train()
        log = model.train_step(inputs_for(cfg), optim_wrapper)
        model.eval()
        with torch.no_grad():
            results = model.test_step(inputs_for(cfg))
    assert torch.isfinite(log['loss'])
    # Every parameter of the backbone got a gradient: DDP needs that.
    state = optim_wrapper.optimizer.state
    unused = [
        n
        for n, p in model.backbone.named_parameters()
        if not state[p].get('exp_avg', torch.zeros(1)).any()
    ]
    assert not unused
    assert len(results) == 2
    if cfg.default_scope == 'mmdet':
        assert len(results[0].pred_instances.scores) >= 0
    else:
        assert results[0].pred_sem_seg.data.shape == (1, *SIZE)
    return results


def test_every_example_is_tested():
    names = {path.name for path in FOLDER.glob('*.py')}
    assert names == {*SMALL, *OWN_DATA}


@pytest.mark.parametrize('name', SMALL)
def test_example(name):
    train_and_run(load_small(name))


def test_deeplab_at_8():
    cfg = load_small(
        'deeplabv3plus_convnext-t-d16_4xb4-160k_ade20k-512x512.py', output_stride=8
    )
    cfg.model.decode_head.dilations = (1, 12, 24, 36)
    train_and_run(cfg)


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
