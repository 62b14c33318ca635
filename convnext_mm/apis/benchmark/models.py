"""Whole detectors and segmentors: a recipe's model with this package's backbone
and with mmpretrain's, the same weights in both."""

import contextlib
import copy
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm.analysis.meter import Step, own_bytes
from convnext_mm.archs import ARCHS
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models.block import IMPL_VARIABLE
from convnext_mm.models.layer_id import default_num_layers

from .networks import DEPLOY, OTHERS, TOLERANCE, Paper, difference

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = dict(
    detector='configs/mask_rcnn/mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py',
    cascade='configs/cascade/'
    'cascade-mask-rcnn_convnext-b_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco.py',
    segmentor='configs/upernet/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
)
# Roundoff that swaps two proposals of nearly equal score changes what is
# learned from by a whole proposal.
LOSS_TOLERANCE = 5e-3
DISTINCT_IMAGES = 2  # of a synthetic batch; larger ones repeat them
NUM_INSTANCES = 8  # for each image, about COCO's mean
# Names in a block of mmpretrain's ConvNeXt, in place of ours.
MMPRETRAIN_NAMES = {
    'dwconv.': 'depthwise_conv.',
    'pwconv1.': 'pointwise_conv1.',
    'pwconv2.': 'pointwise_conv2.',
}
AMP_DTYPES = {'amp': 'bfloat16', 'amp-fp16': 'float16'}
# Whose settings of other backbones are measured, and of Swin what its sizes differ
# in (arXiv 2103.14030, section 3.3): width, blocks and heads of each stage.
MMDET_SWIN = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
MMDET_RESNET = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py'
SWIN_SIZES = dict(
    tiny=(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    small=(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    base=(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    large=(192, [2, 2, 18, 2], [6, 12, 24, 48]),
)


def set_arch(cfg: Config, arch: str) -> None:
    """Changes the backbone of a config and what its neck or heads expect."""
    cfg.model.backbone.arch = arch
    with torch.device('meta'):
        channels = list(MODELS.build(cfg.model.backbone).channels)
    _set_channels(cfg, channels)


def _set_channels(cfg: Config, channels: Sequence[int]) -> None:
    """What neck or heads expect of a backbone."""
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels = channels
        cfg.model.auxiliary_head.in_channels = channels[2]


def with_mmpretrain(cfg: Config) -> Config:
    """The same model with mmpretrain's backbone."""
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.pop('out_layout', None)
    cfg.model.backbone.update(
        type='mmpretrain.ConvNeXt',
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
    )
    return cfg


def rename(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights under the names that mmpretrain's backbone has."""
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith('backbone.'):
            for ours, theirs in MMPRETRAIN_NAMES.items():
                name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def build_models(cfgs: dict[str, Config], seed: int) -> dict[str, nn.Module]:
    """The models of configs that differ in their backbones, all ConvNeXts with
    the initial weights of the first, which has this package's backbone. Call it
    in the configs' scope."""
    set_random_seed(seed)
    models: dict[str, nn.Module] = {}
    for name, cfg in cfgs.items():
        model = MODELS.build(copy.deepcopy(cfg.model))
        if name in OTHERS or not models:
            model.init_weights()
            weights = model.state_dict()
        elif cfg.model.backbone.type == 'mmpretrain.ConvNeXt':
            model.load_state_dict(rename(weights))
        else:
            model.load_state_dict(weights)
        if name == 'paper':
            model.backbone = Paper(model.backbone)
        models[name] = revert_sync_batchnorm(model)
    return models


def read_config(
    task: str, arch: str, size: Sequence[int], dtype: str, device: str
) -> Config:
    """The config of a task for random weights and images of one size.

    Args:
        size: (H, W).
        dtype: ``'fp32'``, ``'amp'`` (bf16 autocast) or ``'amp-fp16'``.

    Raises:
        ConfigError: fp16 on a CPU, or there is no such config.
    """
    path = ROOT / CONFIGS[task]
    if not path.is_file():
        raise ConfigError(
            f'{path} does not exist: whole models are measured from a checkout of '
            'the repository, which holds the recipes'
        )
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    set_arch(cfg, arch)
    cfg.model.backbone.pop('init_cfg', None)
    if task == 'segmentor':
        cfg.model.data_preprocessor.size = tuple(size)
    optim_wrapper = cfg.optim_wrapper
    optim_wrapper.paramwise_cfg.num_layers = default_num_layers(ARCHS[arch].depths)
    if dtype == 'fp32':
        optim_wrapper.type = 'OptimWrapper'
        for key in ('dtype', 'loss_scale'):
            optim_wrapper.pop(key, None)
    elif device == 'cpu' and dtype == 'amp-fp16':
        raise ConfigError(
            '--dtype amp-fp16 of a whole model needs --device '
            'cuda; a CPU takes amp (bf16) and fp32'
        )
    else:
        optim_wrapper.update(
            type='convnext_mm.AmpOptimWrapper', dtype=AMP_DTYPES[dtype]
        )
    return cfg


def synthetic_batch(task: str, cfg: Config, batch: int, size: Sequence[int]) -> dict:
    """Random images with annotations, as a data loader gives them."""
    rng = np.random.default_rng(0)
    height, width = size
    annotate = _classes if task == 'segmentor' else _instances
    images, samples = [], []
    for _ in range(min(batch, DISTINCT_IMAGES)):
        sample = annotate(rng, cfg, height, width)
        sample.set_metainfo(
            dict(
                img_shape=size,
                ori_shape=size,
                pad_shape=size,
                batch_input_shape=size,
                scale_factor=(1.0, 1.0),
                flip=False,
            )
        )
        samples.append(sample)
        images.append(
            torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
        )
    order = [i % DISTINCT_IMAGES for i in range(batch)]
    return dict(
        inputs=[images[i] for i in order],
        data_samples=[copy.deepcopy(samples[i]) for i in order],
    )


def _instances(
    rng: np.random.Generator, cfg: Config, height: int, width: int
) -> BaseDataElement:
    """Ellipses, each a 16th to a half of the image high and wide."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    sides = rng.uniform(1 / 16, 1 / 2, (NUM_INSTANCES, 2))
    corners = rng.uniform(0, 1 - sides)
    boxes = np.hstack([corners, corners + sides])
    boxes *= width, height, width, height
    x1, y1, x2, y2 = boxes.T[..., None, None]
    ys, xs = np.mgrid[:height, :width]
    masks = (
        ((2 * xs - x1 - x2) / (x2 - x1)) ** 2 + ((2 * ys - y1 - y2) / (y2 - y1)) ** 2
        < 1
    ).astype(np.uint8)
    heads = cfg.model.roi_head.bbox_head  # a cascade has several
    num_classes = (heads[0] if isinstance(heads, list) else heads).num_classes
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(rng.integers(0, num_classes, NUM_INSTANCES)),
            masks=BitmapMasks(masks, height, width),
        )
    )


def _classes(
    rng: np.random.Generator, cfg: Config, height: int, width: int
) -> BaseDataElement:
    """Squares of random classes, 32 pixels wide."""
    from mmseg.structures import SegDataSample

    num_classes = cfg.model.decode_head.num_classes
    labels = rng.integers(0, num_classes, (-(-height // 32), -(-width // 32)))
    labels = labels.repeat(32, 0).repeat(32, 1)[None, :height, :width]
    return SegDataSample(gt_sem_seg=PixelData(data=torch.from_numpy(labels)))


class Models:
    """Models of one task that differ in their backbones, and one synthetic batch.

    Args:
        task: A key of ``CONFIGS``.
        names: Implementations of this package's backbone, ``'paper'``,
            ``'mmpretrain'``, and those in ``OTHERS``.
        arch, batch, size: Of the backbone, and the batch's.
        dtype: See :func:`read_config`.
        device: ``'cpu'`` or ``'cuda'``.
    """

    training = True

    def __init__(
        self,
        task: str,
        names: Sequence[str],
        arch: str,
        batch: int,
        size: Sequence[int],
        dtype: str,
        device: str,
    ) -> None:
        self.task, self.size, self.device = task, size, device
        self.cfg = read_config(task, arch, size, dtype, device)
        self.cfgs = with_backbones(self.cfg, names)
        self._expected: tuple[str, Sequence[Tensor], float] | None = None
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope), quiet():
            self.models: dict[str, Any] = {
                name: model.to(device).train(self.training)
                for name, model in build_models(self.cfgs, seed=0).items()
            }
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        self.batch = synthetic_batch(self.task, self.cfg, batch, self.size)

    def own_bytes(self, name: str) -> int:
        """Of a model."""
        return own_bytes(self.models[name])

    @torch.no_grad()
    def maps(self, name: str, autocast: torch.dtype | None = None) -> list[Tensor]:
        """What a model's backbone makes of the batch, without drop path."""
        backbone = self.models[name].backbone
        backbone.eval()  # mmpretrain's returns nothing
        with torch.autocast(self.device, autocast, enabled=autocast is not None):
            maps = list(backbone(self._data(name)['inputs']))
        backbone.train(self.training)
        return maps

    def _data(self, name: str) -> dict:
        preprocessor = self.models[name].data_preprocessor
        return preprocessor(copy.deepcopy(self.batch), self.training)

    def loss(self, name: str) -> Tensor:
        """Of the batch, where models train."""
        return torch.ones(())

    def check_equal(self) -> None:
        """:meth:`check` of all models."""
        for name in self.models:
            self.check(name)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """That a model gives, in fp32, the maps and losses of the first ConvNeXt that
        was checked.

        Raises:
            ValueError: It does not.
        """
        if name in OTHERS:
            return
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            maps, loss = self.maps(name), self.loss(name).item()
        if self._expected is None:
            self._expected = name, maps, loss
        first, expected_maps, expected_loss = self._expected
        error = difference(expected_maps, maps)
        if not error < TOLERANCE:
            raise ValueError(
                f'{self.task}: the maps of {name} and {first} '
                f'differ by {error:.1e} of the largest value, more '
                f'than {TOLERANCE:.0e}'
            )
        if not abs(loss / expected_loss - 1) <= LOSS_TOLERANCE:
            raise ValueError(
                f'{self.task}: the loss with {name} is '
                f'{loss:.6g}, with {first} {expected_loss:.6g}; from '
                'the same weights they may differ by '
                f'{LOSS_TOLERANCE:.0e} of their value'
            )


class Training(Models):
    """Ready for train steps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        with DefaultScope.overwrite_default_scope(self.cfg.default_scope), quiet():
            self.optim_wrappers = {
                name: build_optim_wrapper(model, self.cfgs[name].optim_wrapper)
                for name, model in self.models.items()
            }

    def step(self, name: str) -> Step:
        """A train step: the batch to the device, loss, backward, optimizer."""
        data = [copy.deepcopy(self.batch)]  # a step may change what it gets

        def run() -> None:
            self.models[name].train_step(data.pop(), self.optim_wrappers[name])

        return Step(run, lambda: data.append(copy.deepcopy(self.batch)))

    def step_of(self, name: str, batch: int) -> None:
        """A train step with another batch, which leaves no gradients."""
        if len(self.batch['inputs']) != batch:
            self.set_batch(batch)
        try:
            self.step(name).run()
        finally:
            self.optim_wrappers[name].zero_grad()

    def own_bytes(self, name: str) -> int:
        """Of a model and its optimizer's state."""
        return super().own_bytes(name) + state_bytes(
            self.optim_wrappers[name].optimizer
        )

    def loss(self, name: str) -> Tensor:
        """Of the batch, without drop path, from one seed."""
        model = self.models[name]
        model.backbone.eval()
        set_random_seed(0)
        losses = model(**self._data(name), mode='loss')
        model.backbone.train()
        return model.parse_losses(losses)[0]

    def flops(self) -> int:
        """Of the matrix products and convolutions in forward and backward."""
        name = next(iter(self.models))
        # PyTorch counts its own operators.
        with (
            mock.patch.dict(os.environ, {IMPL_VARIABLE: 'eager'}),
            FlopCounterMode(display=False) as counter,
        ):
            torch.autograd.backward(self.loss(name))
        self.models[name].zero_grad(set_to_none=True)
        return counter.get_total_flops()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of what an optimizer keeps on a GPU."""
    return sum(
        t.nbytes
        for entry in optimizer.state.values()
        for t in entry.values()
        if isinstance(t, Tensor) and t.device.type != 'cpu'
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the names of all parameters, which constructors print."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def with_backbones(cfg: Config, names: Sequence[str]) -> dict[str, Config]:
    """A config with each of these backbones. Ours comes first: it is the one whose
    weights the other ConvNeXts get; those of other networks are their own."""
    rank = {'paper': 1, 'mmpretrain': 2, **dict.fromkeys(OTHERS, 3)}
    return {
        name: _with_backbone(cfg, name)
        for name in sorted(names, key=lambda name: rank.get(name, 0))
    }


def _with_backbone(cfg: Config, name: str) -> Config:
    if name == 'mmpretrain':
        cfg = with_mmpretrain(cfg)
        # Its own libraries' layer decay: by stages ours serves our backbone only.
        cfg.optim_wrapper.constructor = 'LearningRateDecayOptimizerConstructor'
        return cfg
    arch, cfg = cfg.model.backbone.arch, copy.deepcopy(cfg)
    if name not in OTHERS:
        cfg.model.backbone.impl = (
            'eager' if name == 'paper' else name.removesuffix(DEPLOY)
        )
    else:
        theirs = get_config(MMDET_SWIN if name == 'swin' else MMDET_RESNET).model
        cfg.model.backbone, channels = theirs.backbone, theirs.neck.in_channels
        cfg.model.backbone.type = f'mmdet.{cfg.model.backbone.type}'
        cfg.model.backbone.pop('init_cfg', None)
        if name == 'swin':
            width, depths, heads = SWIN_SIZES[arch]
            cfg.model.backbone.update(embed_dims=width, depths=depths, num_heads=heads)
            channels = [width * 2**i for i in range(4)]
        _set_channels(cfg, channels)
    if name in ('paper', *OTHERS):
        # Layers are not numbered there, and memory does not depend on the rates.
        for key in ('constructor', 'paramwise_cfg'):
            cfg.optim_wrapper.pop(key, None)
    return cfg
