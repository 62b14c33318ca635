"""Parameters and FLOPs of whole models, in the papers' convention."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NUM_PROPOSALS = 1000  # through every box head
NUM_DETECTIONS = 100  # through every mask head
DETECTOR_SHAPE = (800, 1280)
Shape = tuple[int, int]


class Cost(NamedTuple):
    """Parameters and multiply-accumulates (0 for parts that training alone
    uses)."""

    params: int
    flops: int


def build_model(cfg: Config, device: str = 'meta') -> nn.Module:
    """The model of a config in evaluation mode; on the meta device its weights
    take neither memory nor time."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model_cfg = copy.deepcopy(cfg.model)  # models change what they get
    if 'data_preprocessor' in cfg:  # where MMPretrain's configs have it
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    with torch.device(device):
        return MODELS.build(model_cfg).eval()


def default_shape(cfg: Config) -> Shape:
    """The (H, W) at which the papers count: 800 x 1280 for a detector, the
    scale of the test pipeline for a segmentor (its long side goes with 4:1
    images), the crop for a classifier.

    Raises:
        ValueError: The config is of another kind.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        return DETECTOR_SHAPE
    for step in cfg.get('test_pipeline') or ():
        if scope == 'mmseg' and step.type == 'Resize':
            width, height = step.scale
            return height, width
        if scope == 'mmpretrain' and step.type in ('CenterCrop', 'Resize'):
            size = step.get('crop_size') or step.get('scale')
            return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    raise ValueError(
        f'no image size known for default_scope {scope!r} and '
        'this test_pipeline; give one with --shape H W'
    )


def measure(cfg: Config, shape: Shape) -> dict[str, Cost]:
    """:func:`count` of a config's model: on the meta device, which takes
    seconds, or for a model that needs numbers (queries, matching) on the CPU.
    """
    try:
        return count(build_model(cfg), shape)
    except ValueError:
        return count(build_model(cfg, 'cpu'), shape)


@torch.no_grad()
def count(model: nn.Module, shape: Shape) -> dict[str, Cost]:
    """Parameters and FLOPs of each part of a model.

    FLOPs are multiply-accumulates of convolutions and matrix products (the
    convention of the ConvNeXt papers and of OpenMMLab's counters) for one
    image. Two-stage detectors send 1000 proposals through every box head and
    100 through every mask head.

    Args:
        model: From :func:`build_model`, or any detector, segmentor or
            classifier in evaluation mode.
        shape: (H, W) of the image.

    Returns:
        Part, such as ``'backbone'``, to its cost, in the order in which the
        model has them.

    Raises:
        ValueError: The model cannot be run on an image of this shape alone.
    """
    device = next(model.parameters()).device
    image = torch.zeros(1, 3, *shape, device=device)
    flops: Counter[str] = Counter()
    with FlopCounterMode(display=False) as counter, ExitStack() as stack:
        for name, part in _parts(model):
            modules = part if isinstance(part, nn.ModuleList) else [part]
            for module in modules:
                stack.enter_context(_recorded(module, name, counter, flops))
        _run(model, image)
    counted: set[int] = set()
    return {
        name: Cost(_num_parameters(part, counted), flops[name] // 2)
        for name, part in _parts(model)
    }


def total(costs: dict[str, Cost]) -> Cost:
    return Cost(*(sum(values) for values in zip(*costs.values())))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, part): the model's children, RoI heads split further."""
    for name, child in model.named_children():
        if name == 'data_preprocessor':
            continue
        if name == 'roi_head':
            for inner, part in child.named_children():
                yield f'{name}.{inner}', part
        else:
            yield name, child


def _num_parameters(part: nn.Module, counted: set) -> int:
    """Parameters that were not counted before, for heads may share them."""
    new = {id(p): p.numel() for p in part.parameters() if id(p) not in counted}
    counted.update(new)
    return sum(new.values())


@contextmanager
def _recorded(
    module: nn.Module, name: str, counter: FlopCounterMode, flops: Counter
) -> Iterator[None]:
    """Adds what runs inside ``module.forward`` to ``flops[name]``.

    Not a hook: OpenMMLab's models call ``head.forward`` as well as ``head``.
    """
    forward = module.forward

    def recorded_forward(*args: Any, **kwargs: Any) -> Any:
        start = counter.get_total_flops()
        outputs = forward(*args, **kwargs)
        flops[name] += counter.get_total_flops() - start
        return outputs

    vars(module)['forward'] = recorded_forward
    try:
        yield
    finally:
        del vars(module)['forward']


def _run(model: Any, image: Tensor) -> None:
    roi_head = getattr(model, 'roi_head', None)
    try:
        if roi_head is None:
            model(image, _samples(model, image), mode='tensor')
            return
        features = model.extract_feat(image)
        if getattr(model, 'rpn_head', None) is not None:
            model.rpn_head(features)
        _run_roi_head(roi_head, image)
    except Exception as error:
        raise ValueError(
            f'{type(model).__name__} does not run on a plain image of '
            f'{image.shape[2]} x {image.shape[3]}, so its FLOPs cannot be '
            f'counted: {error}'
        ) from error


def _samples(model: nn.Module, image: Tensor) -> list | None:
    """What a detector with queries asks for beside the image: its size."""
    if not type(model).__module__.startswith('mmdet.'):
        return None
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    return [
        DetDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                pad_shape=shape,
                batch_input_shape=shape,
                scale_factor=(1.0, 1.0),
            )
        )
    ]


def _run_roi_head(roi_head: nn.Module, image: Tensor) -> None:
    for kind, number in (('bbox', NUM_PROPOSALS), ('mask', NUM_DETECTIONS)):
        heads = getattr(roi_head, f'{kind}_head', None)
        if heads is None:
            continue
        extractors = getattr(roi_head, f'{kind}_roi_extractor')
        if not isinstance(heads, nn.ModuleList):
            heads, extractors = [heads], [extractors]
        for head, extractor in zip(heads, extractors):
            size = extractor.roi_layers[0].output_size
            head(image.new_zeros(number, extractor.out_channels, *size))
