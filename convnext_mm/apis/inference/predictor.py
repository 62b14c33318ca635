"""A model that is ready to look at pictures, on MMDetection's or MMSegmentation's
inferencer."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from convnext_mm.apis.config import load_config
from convnext_mm.apis.draw import colours, draw_sample
from convnext_mm.apis.quiet import quiet
from convnext_mm.apis.test import use_test_time_augmentation
from convnext_mm.apis.zoo import resolve
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone

from .sources import Picture

# Larger pictures are shrunk before a model sees them: it resizes them anyway, and
# masks and scores of every class have the size of the picture.
MAX_PIXELS = dict(mmdet=16_000_000, mmseg=4_000_000)


class Predictor:
    """A model that is ready to look at pictures.

    Args:
        model, checkpoint: Of :func:`convnext_mm.apis.zoo.resolve`.
        device: Such as ``'cpu'`` or ``'cuda:1'``; by default the best there is.
        tta: Average over scales and flips, as ``tta_model`` and ``tta_pipeline``
            of the config say.
        deploy: Fold and pack a ConvNeXt for inference; the same numbers up to
            rounding.
        cfg_options: Settings of the config to override.

    Raises:
        ConfigError: A name or setting is wrong, or the model does not detect or
            segment.
        CheckpointError: The weights cannot be fetched or read, or are not those of
            the model.
    """

    def __init__(
        self,
        model: str,
        checkpoint: str | None = None,
        device: str | None = None,
        tta: bool = False,
        deploy: bool = True,
        cfg_options: dict | None = None,
    ) -> None:
        _check_device(device)
        config, weights, _ = resolve(model, checkpoint)
        cfg = load_config(config, cfg_options=cfg_options)
        self.scope = cfg.get('default_scope')
        if self.scope not in MAX_PIXELS:
            raise ConfigError(
                f'{config} is for {self.scope}: pictures are looked at by detectors '
                "(default_scope='mmdet') and segmentors ('mmseg')"
            )
        if tta:
            whole = copy.deepcopy(cfg)
            use_test_time_augmentation(whole, config)
            cfg.model = whole.model.module
            cfg.test_dataloader.dataset.pipeline = whole.tta_pipeline
        self.inferencer = _build(cfg, weights, device)
        if tta:
            outer = {k: v for k, v in whole.model.items() if k != 'module'}
            network = self.inferencer.model
            self.inferencer.model = MODELS.build(dict(**outer, module=network)).eval()
        if deploy:
            for module in self.inferencer.model.modules():
                if isinstance(module, StagedBackbone):
                    module.switch_to_deploy()
        self.max_pixels = MAX_PIXELS[self.scope]

    @property
    def dataset_meta(self) -> dict[str, Any]:
        """Names and colours of the classes."""
        network: Any = _network(self.inferencer.model)
        return network.dataset_meta

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.dataset_meta['classes'])

    @property
    def reduce_zero_label(self) -> bool:
        """Whether 0 stands for no class in the data set's maps."""
        return self.inferencer.reduce_zero_label

    def can_batch(self, first: Picture, second: Picture) -> bool:
        """Detectors pad pictures to one size, segmentors do not."""
        return self.scope == 'mmdet' or first.image.shape == second.image.shape

    def __call__(
        self, pictures: Sequence[Picture], threshold: float = 0.3
    ) -> list[Any]:
        """
        Args:
            pictures: A batch that :attr:`can_batch`.
            threshold: Objects with lower scores are left out.

        Returns:
            A data sample of MMDetection or MMSegmentation for each, on the CPU,
            in the pixels of ``picture.image``; objects by score, highest first.
        """
        images = [picture.image for picture in pictures]
        with quiet():
            samples = [sample.cpu() for sample in self._samples(images)]
        for sample in samples:
            # Test pipelines load annotations: here there are none.
            for name in ('gt_instances', 'ignored_instances', 'gt_sem_seg'):
                sample.pop(name, None)
            if 'pred_instances' in sample:
                found = sample.pred_instances
                found = found[found.scores >= threshold]
                order = found.scores.argsort(descending=True)
                sample.pred_instances = found[order]
        return samples

    def _samples(self, images: list[np.ndarray]) -> list[Any]:
        (batch,) = self.inferencer.preprocess(images, batch_size=len(images))
        if self.scope == 'mmdet':  # beside what it was made of
            batch = batch[1]
        with torch.inference_mode():
            return self.inferencer.forward(batch)

    def draw(
        self, picture: Picture, sample: Any, opacity: float, with_labels: bool = True
    ) -> np.ndarray:
        """What was found; where the sample has ground truth, that on its left.

        Args:
            picture, sample: The same.
            opacity: Of colours over the picture, in [0, 1].
            with_labels: Write names into a segmentor's regions.

        Returns:
            (H, W, 3) uint8, red first.
        """
        rgb = picture.image[:, :, ::-1]
        return draw_sample(rgb, sample, self.dataset_meta, opacity, with_labels)


def _check_device(device: str | None) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ['cpu', *(f'cuda:{i}' for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f'device {device!r} cannot be used ({reason}); there are: '
            + ', '.join(there)
        ) from None


def _network(model: nn.Module) -> nn.Module:
    """What lies in a model for test-time augmentation."""
    return getattr(model, 'module', model)


class _OwnWeights:
    """An inferencer that takes all weights of a checkpoint or none, and whose
    classes are those of the checkpoint or else of the config's data set."""

    def _load_weights_to_model(
        self, model: Any, checkpoint: dict[str, Any], cfg: Config
    ) -> None:
        mmengine_checkpoint._load_checkpoint_to_model(model, checkpoint, strict=True)
        dataset = dict(copy.deepcopy(cfg.test_dataloader.dataset), lazy_init=True)
        dataset = DATASETS.build(dataset)
        of_config = dict(dataset.metainfo)
        self.reduce_zero_label = bool(getattr(dataset, 'reduce_zero_label', False))
        meta = checkpoint.get('meta') or {}
        # MMDetection 2 and MMSegmentation 0 wrote capitals.
        stored = meta.get('dataset_meta') or meta
        stored = {str(key).lower(): value for key, value in stored.items()}
        numbers = {getattr(module, 'num_classes', None) for module in model.modules()}
        classes = next(
            (
                found
                for found in (stored.get('classes'), of_config.get('classes'))
                if isinstance(found, (list, tuple)) and len(found) in numbers
            ),
            None,
        )
        if classes is None:
            raise ConfigError(
                "neither the checkpoint nor the config's data set names as many "
                "classes as the model has: add metainfo=dict(classes=('first', ...)) "
                'to test_dataloader.dataset'
            )
        palette = of_config.get('palette') or stored.get('palette')
        model.dataset_meta = dict(
            classes=tuple(map(str, classes)), palette=colours(len(classes), palette)
        )


def _build(cfg: Config, weights: str, device: str | None) -> BaseInferencer:
    with quiet():
        if cfg.default_scope == 'mmdet':
            from mmdet.apis import DetInferencer as Inferencer
        else:
            from mmseg.apis import MMSegInferencer as Inferencer

        class Own(_OwnWeights, Inferencer):
            pass

        return Own(model=cfg, weights=weights, device=device, show_progress=False)
