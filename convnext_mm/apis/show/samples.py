"""Images as a network gets them, with what it is to find."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import set_random_seed
from mmengine.structures import PixelData

from convnext_mm.apis.draw import draw_sample
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.errors import ConfigError

from .output import save

SPLITS = ('train', 'val', 'test')
COLUMNS = 4


class Sample(NamedTuple):
    """A drawn sample.

    Attributes:
        number: Its index in the data set.
        picture: (H, W, 3) uint8, RGB, with boxes and masks or classes.
        title: Its file, and its class where the data set is for classification.
    """

    number: int
    picture: np.ndarray
    title: str


def draw_samples(
    cfg: Config, split: str = 'train', count: int = 8, seed: int = 0
) -> list[Sample]:
    """Draws samples of a data set as they leave its pipeline. What happens to whole
    batches comes after that: mixing, padding, normalisation by the model.

    Args:
        cfg: The whole config.
        split: One of :data:`SPLITS`.
        count: How many; no more than there are.
        seed: Of the choice of samples and of augmentation.

    Raises:
        ConfigError: The config has no such data, or ``count`` is below 1.
        DataError: The data is missing or bad.
    """
    loader = f'{split}_dataloader'
    if split not in SPLITS or not cfg.get(loader):
        having = [name for name in SPLITS if cfg.get(f'{name}_dataloader')]
        raise ConfigError(
            f'the config has no {loader}: take a --split that it has '
            f'({", ".join(having) or "none"})'
        )
    if count < 1:
        raise ConfigError(f'--count must be at least 1, got {count}')
    check_data(cfg, [loader])
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    dataset: Any = DATASETS.build(copy.deepcopy(cfg[loader].dataset))
    set_random_seed(seed)
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()
    packed = [dataset[index] for index in chosen]
    pipeline = _pipeline_of(dataset)
    return [
        _draw(dataset, index, results, pipeline)
        for index, results in zip(chosen, packed)
    ]


def write_samples(samples: Sequence[Sample], folder: Path, title: str = '') -> Path:
    """Writes each sample, and one picture of all.

    Args:
        samples: From :func:`draw_samples`.
        folder: Where each is written; that of all is beside it, ``FOLDER.png``.
        title: Over all.

    Returns:
        The picture of all.

    Raises:
        ConfigError: They cannot be written there.
    """
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    ratios = [s.picture.shape[0] / s.picture.shape[1] for s in samples]
    heights = [max(ratios[i : i + columns]) for i in range(0, len(ratios), columns)]
    grid = Figure(
        figsize=(4 * columns, 4 * sum(heights) + 0.3 * rows + 0.4), layout='constrained'
    )
    axes = grid.subplots(rows, columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.axis('off')
    for axis, sample in zip(axes.flat, samples):
        axis.imshow(sample.picture)
        axis.set_title(sample.title, fontsize=9)
        height, width = sample.picture.shape[:2]
        alone = Figure(figsize=(width / 100, height / 100), dpi=100)
        alone.figimage(sample.picture)
        save(alone, folder / f'{sample.number:06d}.png', dpi=100)
    grid.suptitle(title)
    return save(grid, folder.with_suffix('.png'))


class _Pipeline(NamedTuple):
    """What of a pipeline has to be known to draw what it gives."""

    normalise: Any | None  # a transform; most leave it to the model
    loads_late: bool  # boxes of the image before it was resized, as evaluation has it


def _pipeline_of(dataset: Any) -> _Pipeline:
    transforms = _transforms(dataset)
    names = [type(transform).__name__ for transform in transforms]
    loading = [i for i, name in enumerate(names) if name.endswith('Annotations')]
    resizing = [i for i, name in enumerate(names) if 'Resize' in name]
    return _Pipeline(
        next((t for t, name in zip(transforms, names) if name == 'Normalize'), None),
        bool(loading and resizing) and resizing[0] < loading[0],
    )


def _transforms(dataset: Any) -> list[Any]:
    """Of a data set, behind those of the one that it wraps."""
    inner = getattr(dataset, 'dataset', None)
    if inner is None:
        inner = next(iter(getattr(dataset, 'datasets', ())), None)
    pipeline = getattr(dataset, 'pipeline', ())
    own = getattr(pipeline, 'transforms', pipeline)
    return [*([] if inner is None else _transforms(inner)), *own]


def _image(inputs: torch.Tensor, normalise: Any | None) -> np.ndarray:
    """(3, H, W) as packed, to (H, W, 3) uint8, RGB."""
    image = inputs.permute(1, 2, 0).numpy()
    if normalise is not None:
        image = image * normalise.std + normalise.mean
    if normalise is None or not normalise.to_rgb:
        image = image[..., ::-1]
    return np.ascontiguousarray(image.clip(0, 255).round().astype(np.uint8))


def _draw(
    dataset: Any, index: int, results: dict[str, Any], pipeline: _Pipeline
) -> Sample:
    sample = results['data_samples']
    image = _image(results['inputs'], pipeline.normalise)
    title = Path(sample.metainfo.get('img_path') or str(index)).name
    meta = dict(dataset.metainfo)
    picture = image
    if 'gt_instances' in sample:
        before = sample.metainfo['ori_shape' if pipeline.loads_late else 'img_shape']
        _fit_instances(sample.gt_instances, before, image.shape[:2])
        picture = draw_sample(image, sample, meta)
    elif 'gt_sem_seg' in sample:
        # Evaluation compares with maps of the size before resizing.
        classes = F.interpolate(
            sample.gt_sem_seg.data[None].float(), image.shape[:2], mode='nearest-exact'
        )
        sample.gt_sem_seg = PixelData(data=classes[0].long())
        picture = draw_sample(image, sample, meta)
    elif 'gt_label' in sample:
        names = meta.get('classes') or []
        title += ': ' + ', '.join(
            names[i] if i < len(names) else str(i) for i in sample.gt_label.tolist()
        )
    return Sample(index, picture, title)


def _fit_instances(
    instances: Any, before: Sequence[int], shape: tuple[int, int]
) -> None:
    """From ``before``, (H, W) of the image whose boxes these are, to ``shape``."""
    from mmdet.structures.bbox import BaseBoxes

    boxes = instances.bboxes
    boxes = boxes.tensor if isinstance(boxes, BaseBoxes) else boxes
    scale = boxes.new_tensor([shape[1] / before[1], shape[0] / before[0]])
    instances.bboxes = boxes * scale.repeat(boxes.shape[-1] // 2)
    if 'masks' in instances:
        instances.masks = instances.masks.resize(shape).to_ndarray() > 0
