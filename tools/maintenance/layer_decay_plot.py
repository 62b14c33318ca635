"""Learning-rate factor of each layer under some recipes; part of make_gallery.py."""

from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis.config import load_config
from convnext_mm.apis.quiet import quiet
from convnext_mm.apis.show.learning_rate import layer_of, optimizer_of
from convnext_mm.apis.show.output import COLOURS, GRID, save

COCO = '8xb2-amp-ms-crop-3x_coco'
CASCADE = 'fpn_4conv1fc-giou'
ADE = 'upernet_8xb2-amp-160k_ade20k-512x512'
# Title of a panel to recipes by model.
PANELS = {
    'tiny: 9 blocks in stage 3': {
        'Mask R-CNN': f'mask-rcnn_convnext-t_fpn_{COCO}',
        'Cascade Mask R-CNN': f'cascade-mask-rcnn_convnext-t_{CASCADE}_{COCO}',
        'UPerNet': f'convnext-tiny_{ADE}',
    },
    'base and large: 27 blocks in stage 3': {
        'Cascade Mask R-CNN, base': f'cascade-mask-rcnn_convnext-b_{CASCADE}_{COCO}',
        'Cascade Mask R-CNN, large': (
            f'cascade-mask-rcnn_convnext-l-in22k-pre_{CASCADE}_8xb2-ms-crop-3x_coco'
        ),
        'UPerNet, base': f'convnext-base_{ADE}',
    },
}
AFTER = 'rest'  # output norms, neck, head
TICKS = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
Place = tuple[str, int | None]


def factors(cfg: Config) -> dict[Place, float]:
    """Learning rates over ``optimizer.lr``, from the config's own constructor.

    Args:
        cfg: The whole config.

    Returns:
        Layer (``('stem', None)``, ``('stage 3', 2)``, and for all that is none of the
        backbone's layers ``(AFTER, None)``) to factor, in the order of the network.

    Raises:
        ValueError: Weights of a layer have several learning rates.
    """
    with quiet():
        model = build_model(cfg)
        optimizer = optimizer_of(cfg, model)
    names = {id(param): name for name, param in model.named_parameters()}
    found: dict[Place, float] = {}
    for group in optimizer.param_groups:
        factor = group['lr'] / cfg.optim_wrapper.optimizer.lr
        for param in group['params']:
            layer, block = layer_of(names[id(param)])
            place = (layer if _stage(layer) else AFTER, block)
            if found.setdefault(place, factor) != factor:
                raise ValueError(f'{place} has the factors {found[place]} and {factor}')
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _stage(layer: str) -> int:
    """From 1; 0 for what is none of the backbone's layers."""
    return 1 if layer == 'stem' else int(layer[-1]) if layer[-1].isdigit() else 0


def _order(place: Place) -> tuple[int, bool, int]:
    layer, block = place
    return _stage(layer) or 5, layer.startswith('stage'), block or 0


def draw(path: Path) -> Path:
    """Draws the factors of the recipes in :data:`PANELS`.

    Args:
        path: PNG to write.
    """
    figure = Figure(figsize=(8.6, 9.2), layout='constrained')
    for axis, (title, recipes) in zip(figure.subplots(len(PANELS), 1), PANELS.items()):
        for colour, marker, (label, recipe) in zip(COLOURS, 'os^', recipes.items()):
            cfg = load_config(recipe)
            of_layer = factors(cfg)
            rule = '{decay_type}, {decay_rate}'.format(
                **cfg.optim_wrapper.paramwise_cfg
            )
            axis.plot(
                range(len(of_layer)),
                [*of_layer.values()],
                color=colour,
                marker=marker,
                markersize=5,
                drawstyle='steps-mid',
                label=f'{label}: {rule.replace("_", "-")}',
            )
        places = [*of_layer]
        starts = [places.index(('stem', None)), *_starts(places), len(places) - 1]
        for start in starts[1:]:
            axis.axvline(start - 0.5, color=GRID, zorder=0)
        middles = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], len(places)])]
        axis.set_xticks(middles, ['1', '2', '3', '4', AFTER])
        axis.tick_params(axis='x', length=0)
        axis.set_yscale('log')
        axis.set_yticks(TICKS, [f'{tick:g}' for tick in TICKS])
        axis.minorticks_off()
        axis.set(xlim=(-0.7, len(places) - 0.3), ylim=(0.0075, 1.2))
        axis.tick_params(labelsize=13)
        axis.set_title(title, fontsize=15)
        axis.grid(axis='y', color=GRID)
        axis.spines[['top', 'right']].set_visible(False)
        axis.legend(fontsize=13, loc='lower right')
    figure.supxlabel(
        'stage, with the stem or downsampling layer before it; '
        'rest: output norms, neck, head',
        fontsize=14,
    )
    figure.supylabel('learning rate over that of the head', fontsize=14)
    return save(figure, path)


def _starts(places: list[Place]) -> list[int]:
    """Where stages 2 to 4 begin, with the downsampling layers before them."""
    return [places.index((f'downsampling {stage}', None)) for stage in (2, 3, 4)]
