"""Whole detectors and segmentors: a recipe's model with this package's backbone
and with mmpretrain's, the same weights in both."""
import copy
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from convnext_mm.archs import ARCHS
from convnext_mm.layer_id import default_num_layers

from .meter import Step

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = dict(
    detector='configs/mask_rcnn/'
    'mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py',
    segmentor='configs/upernet/'
    'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py')
SIZES = dict(detector=(800, 1344), segmentor=(512, 512))
LOSS_TOLERANCE = 1e-3
NUM_INSTANCES = 8  # for each image, about COCO's mean
# Names in a block of mmpretrain's ConvNeXt, in place of ours.
MMPRETRAIN_NAMES = {
    'dwconv.': 'depthwise_conv.',
    'pwconv1.': 'pointwise_conv1.',
    'pwconv2.': 'pointwise_conv2.'
}
AMP_DTYPES = {'amp': 'bfloat16', 'amp-fp16': 'float16'}


def set_arch(cfg: Config, arch: str) -> None:
    """Changes the backbone of a config and what its neck or heads expect."""
    cfg.model.backbone.arch = arch
    with torch.device('meta'):
        channels = list(MODELS.build(cfg.model.backbone).channels)
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels = channels
        cfg.model.auxiliary_head.in_channels = channels[2]


def with_mmpretrain(cfg: Config) -> Config:
    """The same model with mmpretrain's backbone."""
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.update(
        type='mmpretrain.ConvNeXt',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False)
    return cfg


def rename(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A model's weights under the names that mmpretrain's backbone has."""
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith('backbone.'):
            for ours, theirs in MMPRETRAIN_NAMES.items():
                name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def build_models(cfgs: Dict[str, Config], seed: int) -> Dict[str, nn.Module]:
    """The models of configs that differ in their backbones, all with the
    initial weights of the first, which has this package's backbone. Call it
    in the configs' scope."""
    set_random_seed(seed)
    models: Dict[str, nn.Module] = {}
    for name, cfg in cfgs.items():
        model = MODELS.build(copy.deepcopy(cfg.model))
        if not models:
            model.init_weights()
            weights = model.state_dict()
        elif cfg.model.backbone.type == 'mmpretrain.ConvNeXt':
            model.load_state_dict(rename(weights))
        else:
            model.load_state_dict(weights)
        models[name] = revert_sync_batchnorm(model)
    return models


def read_config(task: str, arch: str, size: Tuple[int, int], dtype: str,
                device: str) -> Config:
    """The config of a task for random weights and images of one size.

    Args:
        size: (H, W).
        dtype: ``'fp32'``, ``'amp'`` (bf16 autocast) or ``'amp-fp16'``.

    Raises:
        ValueError: The device has no mixed precision.
    """
    cfg = Config.fromfile(ROOT / CONFIGS[task])
    init_default_scope(cfg.default_scope)
    set_arch(cfg, arch)
    cfg.model.backbone.pop('init_cfg', None)
    if task == 'segmentor':
        cfg.model.data_preprocessor.size = tuple(size)
    optim_wrapper = cfg.optim_wrapper
    optim_wrapper.paramwise_cfg.num_layers = default_num_layers(
        ARCHS[arch].depths)
    if dtype == 'fp32':
        optim_wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            optim_wrapper.pop(key, None)
    elif device == 'cpu':
        raise ValueError(
            f'--dtype {dtype} of a whole model needs --device cuda: '
            "MMEngine's mixed precision refuses CPUs; on one use --dtype fp32")
    else:
        optim_wrapper.update(type='AmpOptimWrapper', dtype=AMP_DTYPES[dtype])
    return cfg


def synthetic_batch(task: str, cfg: Config, batch: int,
                    size: Tuple[int, int]) -> dict:
    """Random images with annotations, as a data loader gives them."""
    rng = np.random.default_rng(0)
    height, width = size
    annotate = _instances if task == 'detector' else _classes
    samples = []
    for _ in range(batch):
        sample = annotate(rng, cfg, height, width)
        sample.set_metainfo(
            dict(img_shape=size, ori_shape=size, pad_shape=size,
                 batch_input_shape=size, scale_factor=(1., 1.), flip=False))
        samples.append(sample)
    images = rng.integers(0, 256, (batch, 3, height, width), np.uint8)
    return dict(inputs=list(torch.from_numpy(images)), data_samples=samples)


def _instances(rng: np.random.Generator, cfg: Config, height: int, width: int):
    """Ellipses, each a 16th to a half of the image high and wide."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    sides = rng.uniform(1 / 16, 1 / 2, (NUM_INSTANCES, 2))
    corners = rng.uniform(0, 1 - sides)
    boxes = np.hstack([corners, corners + sides])
    boxes *= width, height, width, height
    x1, y1, x2, y2 = boxes.T[..., None, None]
    ys, xs = np.mgrid[:height, :width]
    masks = (((2 * xs - x1 - x2) / (x2 - x1))**2 +
             ((2 * ys - y1 - y2) / (y2 - y1))**2 < 1).astype(np.uint8)
    num_classes = cfg.model.roi_head.bbox_head.num_classes
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(
                rng.integers(0, num_classes, NUM_INSTANCES)),
            masks=BitmapMasks(masks, height, width)))


def _classes(rng: np.random.Generator, cfg: Config, height: int, width: int):
    """Squares of random classes, 32 pixels wide."""
    from mmseg.structures import SegDataSample
    num_classes = cfg.model.decode_head.num_classes
    labels = rng.integers(0, num_classes, (-(-height // 32), -(-width // 32)))
    labels = labels.repeat(32, 0).repeat(32, 1)[None, :height, :width]
    return SegDataSample(
        gt_sem_seg=PixelData(data=torch.from_numpy(labels)))


class Training:
    """Models of one task, ready for train steps on one synthetic batch.

    Args:
        task: ``'detector'`` or ``'segmentor'``.
        names: Implementations of this package's backbone, and
            ``'mmpretrain'``.
        arch, batch, size: Of the backbone, and the batch's.
        dtype: See :func:`read_config`.
        device: ``'cpu'`` or ``'cuda'``.
    """

    def __init__(self, task: str, names: List[str], arch: str, batch: int,
                 size: Tuple[int, int], dtype: str, device: str) -> None:
        cfg = read_config(task, arch, size, dtype, device)
        self.task, self.cfg, self.size = task, cfg, size
        self.scope = cfg.default_scope
        cfgs = {name: _with_backbone(cfg, name) for name in names}
        # Ours is the one whose weights the others get.
        cfgs = dict(sorted(cfgs.items(), key=lambda c: c[0] == 'mmpretrain'))
        with DefaultScope.overwrite_default_scope(self.scope):
            self.models = {name: model.to(device).train() for name, model
                           in build_models(cfgs, seed=0).items()}
            self.optim_wrappers = {
                name: build_optim_wrapper(model, cfgs[name].optim_wrapper)
                for name, model in self.models.items()
            }
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        self.batch = synthetic_batch(self.task, self.cfg, batch, self.size)

    def step(self, name: str) -> Step:
        """A train step: the batch to the device, loss, backward, optimizer."""
        data = [copy.deepcopy(self.batch)]  # a step may change what it gets

        def run() -> None:
            self.models[name].train_step(data.pop(), self.optim_wrappers[name])

        return Step(run, lambda: data.append(copy.deepcopy(self.batch)))

    @torch.no_grad()
    def losses(self, name: str) -> Dict[str, float]:
        """Of the batch in fp32, without drop path, from one seed."""
        model = self.models[name]
        model.backbone.eval()
        set_random_seed(0)
        with torch.backends.cudnn.flags(allow_tf32=False):
            data = model.data_preprocessor(copy.deepcopy(self.batch), True)
            losses = model.parse_losses(model(**data, mode='loss'))[1]
        model.backbone.train()
        return {key: value.item() for key, value in losses.items()}

    def check_equal(self) -> None:
        """
        Raises:
            SystemExit: Two models' losses differ by more than
                :data:`LOSS_TOLERANCE` of their value.
        """
        (first, expected), *others = (
            (name, self.losses(name)['loss']) for name in self.models)
        for name, loss in others:
            if not abs(loss - expected) <= LOSS_TOLERANCE * abs(expected):
                raise SystemExit(
                    f'error: {self.task}: the loss with {name} is {loss:.6g}, '
                    f'with {first} {expected:.6g}; from the same weights they '
                    f'may differ by {LOSS_TOLERANCE:.0e} of their value')


def _with_backbone(cfg: Config, name: str) -> Config:
    if name != 'mmpretrain':
        cfg = copy.deepcopy(cfg)
        cfg.model.backbone.impl = name
        return cfg
    cfg = with_mmpretrain(cfg)
    # Its own libraries' layer decay: by stages ours serves our backbone only.
    cfg.optim_wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
    return cfg
