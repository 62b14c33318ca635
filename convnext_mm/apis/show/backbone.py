"""What a config's backbone is made of, and what it sees."""

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm.analysis.complexity import build_model
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.apis.quiet import quiet
from convnext_mm.checkpoint.load import load_pretrained
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone

from .learning_rate import layer_id, layer_of, optimizer_of, ranges
from .output import save

Shape = tuple[int, int]
# What is kept for backward grows linearly with the map: two sizes say how.
SAVED_SIDES = (64, 128)
FRACTIONS = (0.5, 0.9, 0.99)
NUM_INPUTS = 8
NUM_CHANNELS = 8  # drawn of each stage
STRIDED = (nn.Conv2d, nn.MaxPool2d)


class Stage(NamedTuple):
    """A stage, with the stem or downsampling layer before it and its output norm.

    Attributes:
        number: From 1.
        channels, depth, stride: Of its map, its blocks, its map.
        shape: (H, W) of its map.
        params: Number of parameters.
        flops: Multiply-accumulates for one image.
        saved_bytes: What training keeps for backward, for one image in fp32, as this
            machine's CPU runs it.
    """

    number: int
    channels: int
    depth: int
    stride: int
    shape: Shape
    params: int
    flops: int
    saved_bytes: int


class Layer(NamedTuple):
    """Layers in a row that train alike.

    Attributes:
        name: ``'stem'``, ``'downsampling 2'``, ``'stage 3 blocks 1-3'``, or
            ``'output norms'``.
        layer_id: Of layer decay; None without.
        lr_scales: Learning rates over ``optimizer.lr``, ascending; empty where frozen.
        params: Number of parameters.
    """

    name: str
    layer_id: int | None
    lr_scales: tuple[float, ...]
    params: int


class Description(NamedTuple):
    """A backbone.

    Attributes:
        size: (H, W) of the image.
        stages: Those that are built.
        layers: In the order of the network.
        layer_decay: One sentence on what the optimizer's constructor does.
    """

    size: Shape
    stages: list[Stage]
    layers: list[Layer]
    layer_decay: str


class ReceptiveField(NamedTuple):
    """Effective receptive field of an emitted map.

    Attributes:
        stage: From 1.
        field: (H, W), share of each pixel; the sum is 1.
        center: (y, x) of the output position in pixels of the input.
        sides: Side in pixels of the square around the centre that holds each of
            :data:`FRACTIONS` of the field.
    """

    stage: int
    field: Tensor
    center: tuple[float, float]
    sides: tuple[int, ...]


def build_backbone(cfg: Config, device: str = 'meta') -> StagedBackbone:
    """The backbone of a config in evaluation mode, without pretrained weights.

    Args:
        cfg: The whole config.
        device: On ``'meta'`` its weights take neither memory nor time.

    Raises:
        ConfigError: The config's model has another backbone, or none.
    """
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    settings: Any = copy.deepcopy((cfg.get('model') or {}).get('backbone'))
    kind = settings.get('type') if settings else None
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(scope) as registry:
            found = registry.get(kind)
    else:
        found = kind
    if not (isinstance(found, type) and issubclass(found, StagedBackbone)):
        raise ConfigError(
            f'model.backbone.type is {getattr(kind, "__name__", kind)!r}, and what is '
            'shown is a network of this package: give a config with type='
            "'convnext_mm.ConvNeXt', 'convnext_mm.IsotropicConvNeXt' or "
            "'convnext_mm.ModernizedResNet'"
        )
    if settings.get('impl') == 'triton':
        settings.impl = 'auto'  # neither the CPU nor meta has it
    try:
        with torch.device(device):
            return MODELS.build(settings).eval()
    except (TypeError, ValueError) as error:
        raise ConfigError(f'model.backbone: {error}') from error


def load_weights(
    backbone: StagedBackbone, checkpoint: str | None, prefix: str | None = None
) -> str:
    """Gives a backbone weights: a checkpoint's, else those that its ``init_cfg``
    names, as training does, else its initial ones.

    Args:
        backbone: On the CPU.
        checkpoint: Of any family, a file or an address.
        prefix: Which network, where the checkpoint holds several.

    Returns:
        Whose weights it has now.

    Raises:
        CheckpointError: It cannot be read, or does not fit.
    """
    if checkpoint:
        load_pretrained(backbone, checkpoint, prefix)
        return f'weights of {Path(checkpoint).name}'
    backbone.init_weights()
    inits = backbone.init_cfg or []
    for init in [inits] if isinstance(inits, dict) else inits:
        if init.get('type') == 'Pretrained':
            return f'weights of {Path(init["checkpoint"]).name}'
    return 'initial weights'


def describe(cfg: Config, size: Shape) -> Description:
    """Counts and measures a config's backbone, stage by stage.

    Parameters and FLOPs are those of :mod:`convnext_mm.analysis.complexity`. Memory
    kept for backward is measured with
    :func:`convnext_mm.analysis.meter.saved_bytes` on squares of :data:`SAVED_SIDES`
    pixels, without drop path, and extended to ``size``: it grows linearly with the
    map. Learning rates are those of the optimizer that the config builds.

    Args:
        cfg: The whole config.
        size: (H, W) of the image.

    Raises:
        ConfigError: The config's model has another backbone, the image is too small
            for it, or ``optim_wrapper`` has a wrong setting.
    """
    with quiet():
        backbone = build_backbone(cfg)
        shapes, flops = _count(backbone, size)
        saved = _saved(backbone, shapes)
        layers, layer_decay = _layers(cfg)
    stages = [
        Stage(
            number=i + 1,
            channels=backbone.channels[i],
            depth=backbone.depths[i],
            stride=stride_of(backbone, i),
            shape=shapes[i],
            params=sum(p.numel() for m in _parts(backbone, i) for p in m.parameters()),
            flops=flops[i],
            saved_bytes=saved[i],
        )
        for i in range(len(backbone.stages))
    ]
    return Description(size, stages, layers, layer_decay)


def stride_of(backbone: StagedBackbone, stage: int) -> int:
    """Pixels of the input from one position of a stage's map to the next."""
    return _grid(backbone, stage)[0]


def _grid(backbone: StagedBackbone, stage: int) -> tuple[int, float]:
    """Stride of a stage's map, and the pixel, counted from 0, in the middle of what
    its first position sees: 1.5 behind a patch of 4, 0 behind a ResNet's stem, whose
    kernels begin in the padding."""
    stride, center = 1, 0.0
    for layers in zip(backbone.downsample_layers, backbone.stages[: stage + 1]):
        for place, module in nn.ModuleList(layers).named_modules():
            # A shortcut has the stride of what it passes.
            if isinstance(module, STRIDED) and '.shortcut.' not in place:
                sizes: list[Any] = [
                    getattr(module, name)
                    for name in ('kernel_size', 'stride', 'padding')
                ]
                kernel, step, padding = (
                    size[0] if isinstance(size, tuple) else size for size in sizes
                )
                if step > 1:
                    center += stride * ((kernel - 1) / 2 - padding)
                    stride *= step
    return stride, center


def _parts(backbone: StagedBackbone, stage: int) -> list[nn.Module]:
    norm = getattr(backbone, f'norm{stage}', None)
    parts = [backbone.downsample_layers[stage], backbone.stages[stage]]
    return parts if norm is None else [*parts, norm]


def _run_stage(
    backbone: StagedBackbone, stage: int, x: Tensor
) -> tuple[Tensor, Tensor]:
    """What the next stage gets, and what is emitted."""
    downsample, blocks, *norm = _parts(backbone, stage)
    x = blocks(downsample(x))
    out = x.mean((2, 3), keepdim=True) if backbone.gap_before_final_norm else x
    return x, norm[0](out) if norm else out


@torch.no_grad()
def _count(backbone: StagedBackbone, size: Shape) -> tuple[list[Shape], list[int]]:
    """(H, W) and multiply-accumulates of each stage."""
    smallest = backbone.min_size
    if min(size) < smallest:
        raise ConfigError(
            f'--shape {size[0]} {size[1]} is too small for this backbone: both sides '
            f'must be at least {smallest}'
        )
    x = torch.zeros(1, backbone.in_channels, *size, device='meta')
    shapes, flops = [], []
    for i in range(len(backbone.stages)):
        with FlopCounterMode(display=False) as counter:
            x, _ = _run_stage(backbone, i, x)
        height, width = x.shape[2:]
        shapes.append((height, width))
        flops.append(counter.get_total_flops() // 2)
    return shapes, flops


def _saved(backbone: StagedBackbone, shapes: Sequence[Shape]) -> list[int]:
    """Bytes that each stage keeps for backward, for maps of these shapes."""
    # Its numbers do not matter, and memory that is not written takes none.
    real = copy.deepcopy(backbone).to_empty(device='cpu').train()  # as BatchNorm is
    modules: list[Any] = [*real.modules()]
    for module in modules:
        if hasattr(module, 'drop_path'):
            module.drop_path = 0.0
    measured = []  # for each size (positions, bytes) of each stage
    for side in SAVED_SIDES:
        side = side * backbone.min_size // 32
        x = torch.zeros(1, backbone.in_channels, side, side)
        before, of_size = 0, []
        for i in range(len(real.stages)):
            # What one stage hands to the next is counted once, whoever keeps it.
            outs: list[Tensor] = []
            kept = saved_bytes(
                functools.partial(_run_stages, real, i + 1, x, outs), real
            )
            of_size.append((outs[-1].shape[2] * outs[-1].shape[3], kept - before))
            before = kept
        measured.append(of_size)
    return [
        round(kept[0] + (kept[1] - kept[0]) * (h * w - n[0]) / (n[1] - n[0]))
        for (h, w), (n, kept) in zip(
            shapes, (zip(small, large) for small, large in zip(*measured))
        )
    ]


def _run_stages(
    backbone: StagedBackbone, number: int, x: Tensor, maps: list[Tensor]
) -> list[Tensor]:
    """Runs the first stages, notes their maps, and gives what they emit."""
    outs = []
    for i in range(number):
        x, out = _run_stage(backbone, i, x)
        maps.append(x)
        outs.append(out)
    return outs


def _layers(cfg: Config) -> tuple[list[Layer], str]:
    if not cfg.get('optim_wrapper'):
        return [], 'The config has no optim_wrapper, so no learning rates.'
    model = build_model(cfg)
    optimizer = optimizer_of(cfg, model)
    base = cfg.optim_wrapper.optimizer.get('lr') or optimizer.defaults['lr']
    group_of = {
        id(p): group for group in optimizer.param_groups for p in group['params']
    }
    params: dict[tuple[str, int | None], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if name.startswith('backbone.'):
            params.setdefault(layer_of(name), []).append(param)
    rows: list[tuple[str, list[int], Layer]] = []
    for (layer, block), held in sorted(params.items(), key=_place):
        groups = [group_of[id(p)] for p in held if id(p) in group_of]
        ids = {layer_id(group) for group in groups}
        row = Layer(
            layer,
            ids.pop() if len(ids) == 1 else None,
            tuple(sorted({float(group['lr']) / base for group in groups})),
            sum(p.numel() for p in held),
        )
        last = rows[-1][2] if rows else None
        if block is not None and last and last[:3] == row[:3]:
            rows[-1][1].append(block)
            rows[-1] = (*rows[-1][:2], row._replace(params=last.params + row.params))
        else:
            rows.append((layer, [] if block is None else [block], row))
    return [
        row._replace(
            name=f'{layer} block{"s" * (len(blocks) > 1)} {ranges(blocks)}'
            if blocks
            else layer
        )
        for layer, blocks, row in rows
    ], _decay_sentence(cfg)


def _place(item: tuple[tuple[str, int | None], Any]) -> tuple[int, int, int]:
    """Where a layer is in the network: stem, stage 1, downsampling 2, ..."""
    (layer, block), _ = item
    if not layer[-1].isdigit():
        return (0 if layer == 'stem' else 5), 0, 0
    return int(layer[-1]), int(layer.startswith('stage')), block or 0


def _decay_sentence(cfg: Config) -> str:
    settings: Any = cfg.optim_wrapper.get('paramwise_cfg') or {}
    rate = settings.get('decay_rate')
    if rate is None:
        return (
            'No layer decay: optim_wrapper.paramwise_cfg has no decay_rate, and '
            'optim_wrapper.optimizer.lr is for all layers but those it names.'
        )
    if rate == 1:
        return 'No layer decay: at decay_rate=1 all layers train at one learning rate.'
    kind = settings.get('decay_type', 'layer_wise')
    return f'Layer decay, {kind}: {rate} for each layer below the last.'


class FeatureMaps(NamedTuple):
    """What the stages make of an image.

    Attributes:
        image: (H, W, 3) uint8, RGB, as the network saw it but for normalisation.
        maps: One (C, H / s, W / s) for each stage.
    """

    image: np.ndarray
    maps: list[Tensor]


@torch.no_grad()
def feature_maps(
    backbone: StagedBackbone, cfg: Config, image: str, size: Shape
) -> FeatureMaps:
    """The stages' maps before their output norms, which would give every position the
    same norm.

    Args:
        backbone: On the CPU, with weights.
        cfg: The whole config; its ``data_preprocessor`` normalises.
        image: Path of a picture.
        size: (H, W) into which the picture is fitted, its ratio kept.

    Raises:
        ConfigError: The picture cannot be read, or is too narrow for the backbone.
    """
    import mmcv

    path = Path(image)
    pixels = mmcv.imread(path) if path.is_file() else None
    if pixels is None:
        raise ConfigError(
            f'--image {image!r} is no picture that can be read: give the path of one '
            '(JPEG, PNG)'
        )
    smallest = backbone.min_size
    pixels = mmcv.imrescale(pixels, (max(size), min(size)))
    if min(pixels.shape[:2]) < smallest or backbone.in_channels != 3:
        raise ConfigError(
            f'--image {image!r} has {pixels.shape[0]} x {pixels.shape[1]} pixels once '
            f'it fits --shape {size[0]} {size[1]}: this backbone takes '
            f'{backbone.in_channels} channels of {smallest} x {smallest} or more'
        )
    maps: list[Tensor] = []
    hooks = [
        stage.register_forward_hook(lambda module, args, out: maps.append(out[0]))
        for stage in backbone.stages
    ]
    backbone(_normalise(pixels, cfg)[None])
    for hook in hooks:
        hook.remove()
    return FeatureMaps(np.ascontiguousarray(pixels[..., ::-1]), maps)


def _normalise(pixels: np.ndarray, cfg: Config) -> Tensor:
    """(H, W, 3) BGR to (3, H, W), as the config's data_preprocessor has it."""
    settings: Any = {
        **(cfg.get('data_preprocessor') or {}),
        **(cfg.model.get('data_preprocessor') or {}),
    }
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float()
    if settings.get('bgr_to_rgb') or settings.get('to_rgb'):
        image = image.flip(0)
    mean, std = (
        torch.tensor(settings.get(key) or [default] * 3, dtype=torch.float32)
        for key, default in (('mean', 0.0), ('std', 1.0))
    )
    return (image - mean[:, None, None]) / std[:, None, None]


def draw_feature_maps(features: FeatureMaps, path: Path, title: str = '') -> Path:
    """Draws the image and, for each stage, the norm over channels and the channels
    that vary most.

    Args:
        features: From :func:`feature_maps`.
        path: PNG to write.
        title: Over it.

    Raises:
        ConfigError: It cannot be written there.
    """
    rows = len(features.maps)
    ratio = features.image.shape[0] / features.image.shape[1]
    side = 1.75
    figure = Figure(
        figsize=(side * (NUM_CHANNELS + 3.2), (side * ratio + 0.3) * rows + 0.5),
        layout='constrained',
    )
    grid = figure.add_gridspec(
        rows, NUM_CHANNELS + 2, width_ratios=[2.2, *[1] * (NUM_CHANNELS + 1)]
    )
    axis = figure.add_subplot(grid[:, 0])
    axis.imshow(features.image)
    axis.set_title('image', fontsize=9)
    axis.axis('off')
    for row, maps in enumerate(features.maps):
        strongest = maps.flatten(1).std(1, correction=0).argsort(descending=True)
        panels = [
            (
                f'stage {row + 1}: norm, {maps.shape[1]} x {maps.shape[2]}',
                maps.norm(dim=0),
                'inferno',
            ),
            *(
                (f'channel {channel}', maps[channel], 'viridis')
                for channel in strongest[:NUM_CHANNELS].tolist()
            ),
        ]
        for column, (name, values, colours) in enumerate(panels, 1):
            axis = figure.add_subplot(grid[row, column])
            # The extremes of a few positions would leave the others one colour.
            low, high = torch.quantile(values.flatten(), torch.tensor([0.01, 0.99]))
            axis.imshow(values, cmap=colours, vmin=float(low), vmax=float(high))
            axis.set_title(name, fontsize=8)
            axis.axis('off')
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def effective_receptive_fields(
    network: Callable[[Tensor], Sequence[Tensor]],
    size: Shape,
    strides: Sequence[int],
    in_channels: int = 3,
    num_inputs: int = NUM_INPUTS,
    seed: int = 0,
    centers: Sequence[float] | None = None,
) -> list[ReceptiveField]:
    """How much each pixel of the input has to do with the central position of each
    map (Luo et al., "Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks", 2016, arXiv 1701.04128).

    It is the size of the gradient with respect to the pixel, averaged over inputs of
    normal noise. What is differentiated is the position's channels, each times a
    random number: their plain sum is constant behind a LayerNorm.

    Args:
        network: From (1, in_channels, H, W) to one (1, C, H / s, W / s) for each map.
        size: (H, W) of the inputs.
        strides: s of each map.
        in_channels: Channels of the input.
        num_inputs: Inputs to average over.
        seed: Of inputs and random numbers.
        centers: Pixel in the middle of what each map's first position sees, the same
            for rows and columns; None: (s - 1) / 2, as behind patches.

    Returns:
        One for each map, ``stage`` counting them from 1.
    """
    if centers is None:
        centers = [(s - 1) / 2 for s in strides]
    generator = torch.Generator().manual_seed(seed)
    fields = [torch.zeros(size, dtype=torch.float64) for _ in strides]
    positions: list[Shape] = []
    for _ in range(num_inputs):
        x = torch.randn(1, in_channels, *size, generator=generator, requires_grad=True)
        maps = network(x)
        positions = [(out.shape[2] // 2, out.shape[3] // 2) for out in maps]
        for number, (out, (row, column)) in enumerate(zip(maps, positions)):
            weights = torch.randn(out.shape[1], generator=generator)
            value = (out[0, :, row, column] * weights).sum()
            (gradient,) = torch.autograd.grad(
                value, x, retain_graph=number + 1 < len(maps)
            )
            fields[number] += gradient[0].abs().mean(0)
    results = []
    for number, (field, (row, column), s, first) in enumerate(
        zip(fields, positions, strides, centers)
    ):
        center = (row * s + first, column * s + first)
        share = field / field.sum().clamp_min(torch.finfo(field.dtype).tiny)
        sides = tuple(_side(share, center, fraction) for fraction in FRACTIONS)
        results.append(ReceptiveField(number + 1, share, center, sides))
    return results


def _side(share: Tensor, center: tuple[float, float], fraction: float) -> int:
    """Side of the smallest square around the centre that holds a fraction."""
    rows, columns = (torch.arange(n) for n in share.shape)
    distance = torch.maximum(
        (rows - center[0]).abs()[:, None], (columns - center[1]).abs()[None]
    )
    sides = (2 * distance + 1).round().long().flatten()
    held = torch.bincount(sides, share.flatten()).cumsum(0)
    # Less a little, for sums of shares round.
    return int((held >= fraction - 1e-9).nonzero()[0])


def receptive_fields_of(
    backbone: StagedBackbone, size: Shape, num_inputs: int = NUM_INPUTS
) -> list[ReceptiveField]:
    """:func:`effective_receptive_fields` of the maps that a backbone emits.

    Args:
        backbone: On the CPU, with weights.
        size: (H, W) of the inputs.
        num_inputs: Inputs to average over.

    Raises:
        ConfigError: The backbone emits no maps.
    """
    if backbone.gap_before_final_norm:
        raise ConfigError(
            'the backbone emits pooled features, which see the whole image: set '
            '--cfg-options model.backbone.gap_before_final_norm=False for the fields '
            'of its maps'
        )
    trained = [p for p in backbone.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    strides, centers = zip(*(_grid(backbone, i) for i in backbone.out_indices))
    fields = effective_receptive_fields(
        backbone, size, strides, backbone.in_channels, num_inputs, centers=centers
    )
    for parameter in trained:
        parameter.requires_grad_(True)
    return [
        field._replace(stage=i + 1) for field, i in zip(fields, backbone.out_indices)
    ]


def draw_receptive_fields(
    fields: Sequence[ReceptiveField], path: Path, title: str = ''
) -> Path:
    """Draws fields side by side, with the squares that hold parts of them.

    Args:
        fields: From :func:`receptive_fields_of`.
        path: PNG to write.
        title: Over it.

    Raises:
        ConfigError: It cannot be written there.
    """
    figure = Figure(figsize=(3.4 * len(fields), 4.3), layout='constrained')
    axes = figure.subplots(1, len(fields), squeeze=False)[0]
    styles = dict(zip(FRACTIONS, ('-', '--', ':')))
    for axis, field in zip(axes, fields):
        height, width = field.field.shape
        y, x = field.center
        # Far pixels have so little that a linear scale would show a point.
        norm = PowerNorm(0.25, 0, float(field.field.max()))
        edges = (-0.5 - x, width - 0.5 - x, height - 0.5 - y, -0.5 - y)
        axis.imshow(field.field, cmap='inferno', norm=norm, extent=edges)
        for fraction, side in zip(FRACTIONS, field.sides):
            axis.add_patch(
                Rectangle(
                    (-side / 2, -side / 2),
                    side,
                    side,
                    fill=False,
                    edgecolor='#59d0ff',
                    linestyle=styles[fraction],
                    linewidth=1.4,
                )
            )
        half = min(0.75 * field.sides[-1], max(height, width) / 2)
        axis.set(xlim=(-half, half), ylim=(half, -half), facecolor='black')
        axis.set_title(
            f'stage {field.stage}\nsides {", ".join(map(str, field.sides))} px',
            fontsize=10,
        )
        axis.tick_params(labelsize=8)
    figure.legend(
        axes[0].patches,
        [f'holds {fraction:.0%}' for fraction in FRACTIONS],
        loc='outside lower center',
        ncols=len(FRACTIONS),
        facecolor='#555555',
        labelcolor='white',
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    return save(figure, path)
