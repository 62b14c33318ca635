"""What each step on the road from ResNet to ConvNeXt costs, and what it gained."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm.analysis.complexity import DETECTOR_SHAPE, measure, total
from convnext_mm.analysis.machine import machine, processor, versions
from convnext_mm.analysis.meter import Meter, Step, saved_bytes
from convnext_mm.apis.benchmark.bench import Running
from convnext_mm.apis.config import load_config
from convnext_mm.apis.quiet import quiet
from convnext_mm.archs import ROADMAP, STEPS, Decisions
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import ModernizedResNet
from convnext_mm.version import __version__

from .roadmap_facts import GROUPS, NOT_KEPT, PEERS, PUBLISHED, SOURCE

NUM_CLASSES = 1000
CLASSIFIER_SHAPE = (224, 224)
# In training BatchNorm needs several positions, of the last map, too.
LEAST_SIDE = 64
CONFIG = 'mask-rcnn_modernized-{}_fpn_8xb2-amp-ms-crop-3x_coco'
ALIGNMENT = 64  # values; a new tensor begins at a multiple of so many bytes
Costs = dict[Decisions, Any]


class Row(NamedTuple):
    """A step.

    Attributes:
        step: Its name.
        group: Of decisions, as in the paper's figure 2.
        is_kept: Whether the steps after it keep its decision.
        top1, std: Published, percent; None: no deviation is given.
        printed_gflops: Published.
        params, flops: Of the classifier: parameters, and multiply-accumulates at 224
            x 224.
        detector_flops: Multiply-accumulates of a Mask R-CNN at 800 x 1280; None where
            not counted.
        saved_bytes: What training keeps for backward, of the backbone, for an image;
            None where not measured, as the rest.
        forward, train: Times of a batch through the backbone, and of a train step
            without the optimizer, from :meth:`convnext_mm.analysis.meter.Meter.times`.
    """

    step: str
    group: str
    is_kept: bool
    top1: float
    std: float | None
    printed_gflops: float
    params: int
    flops: int
    detector_flops: int | None = None
    saved_bytes: int | None = None
    forward: dict | None = None
    train: dict | None = None

    @property
    def is_printed(self) -> bool:
        """Whether the count is the published figure, to its two decimals."""
        return f'{self.flops / 1e9:.2f}' == f'{self.printed_gflops:.2f}'


@dataclasses.dataclass
class RoadmapSettings(Running):
    """What to count and measure. The fields are options of ``convnext-mm show
    roadmap``.

    Args:
        regime: Keys of :data:`convnext_mm.archs.ROADMAP`.
        steps: Those to show; none: all.
        size: (H, W) of the images that are measured with.
        batch: Of them, for times.
        detector: Whether to count Mask R-CNNs, which needs MMDetection.
        measured: Whether to measure memory and time.

    Raises:
        ConfigError: A name is not known, or a number is too small.
    """

    regime: Sequence[str] = ('resnet50',)
    steps: Sequence[str] = ()
    size: Sequence[int] = CLASSIFIER_SHAPE
    batch: int = 1
    detector: bool = True
    measured: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.regime = _named('--regime', ROADMAP, self.regime)
        self.steps = _named('--steps', STEPS, self.steps) or list(STEPS)
        if min(self.size) < LEAST_SIDE:
            raise ConfigError(
                f'--size {" ".join(map(str, self.size))}: both sides must be at least '
                f'{LEAST_SIDE}'
            )
        if self.batch < 1:
            raise ConfigError(f'--batch {self.batch} must be at least 1')


def conditions(settings: RoadmapSettings) -> str:
    """What times were taken of, and where, in words."""
    images = f'{settings.batch} image{"s" * (settings.batch > 1)}'
    height, width = settings.size
    if settings.device == 'cuda':
        where = torch.cuda.get_device_name()
    else:
        threads = f'{settings.threads} thread{"s" * (settings.threads > 1)}'
        where = f'{processor()}, {threads}'
    if settings.clock == 'cpu':
        where += ', time of the processor'
    return f'{images} of {height} x {width}, fp32, {where}'


def as_dict(
    settings: RoadmapSettings, regimes: dict[str, list[Row]], command: str
) -> dict[str, Any]:
    """A result file's content: rows, where they come from, with what and on what."""
    return dict(
        source=SOURCE,
        command=command,
        machine=machine(settings.device),
        versions={'convnext_mm': __version__, **versions()},
        settings=dataclasses.asdict(settings),
        regimes={
            regime: dict(
                peer=PEERS[regime]._asdict(), rows=[row._asdict() for row in rows]
            )
            for regime, rows in regimes.items()
        },
    )


def _named(option: str, known: Iterable[str], given: Sequence[str]) -> list[str]:
    """Those of ``known`` that are given, in its order, whatever case, spaces and
    hyphens."""
    plain = {_plain(name): name for name in known}
    for name in given:
        if _plain(name) not in plain:
            close = difflib.get_close_matches(_plain(name), plain, 3)
            meant = ' or '.join(repr(plain[n]) for n in close)
            raise ConfigError(
                f'{option} {name!r}: there are {", ".join(map(repr, plain.values()))}'
                + (f'; did you mean {meant}?' if meant else '')
            )
    wanted = {_plain(name) for name in given}
    return [name for key, name in plain.items() if key in wanted]


def _plain(name: str) -> str:
    return name.lower().replace(' ', '').replace('-', '').replace('_', '')


def walk(settings: RoadmapSettings) -> dict[str, list[Row]]:
    """Counts and measures the steps of each regime. Progress goes to stderr.

    FLOPs are counted as in :mod:`convnext_mm.analysis.complexity`. Times are those of
    rounds in which each network has one turn, in fp32, from images to all four maps
    with random weights; steps that differ in their training alone share a network.

    Returns:
        Regime to rows, in the paper's order.

    Raises:
        ConfigError: MMDetection, or mmcv's operators, cannot be imported.
    """
    columns = (
        '{task.description}',
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # A screen that is drawn rarely takes no time from what is measured.
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        return {regime: _walk(regime, settings, progress) for regime in settings.regime}


def _walk(regime: str, settings: RoadmapSettings, progress: Progress) -> list[Row]:
    # One name for each network.
    networks = {ROADMAP[regime][step]: step for step in reversed(settings.steps)}
    networks = dict(reversed(networks.items()))

    def each(function: Callable[[str, str], Any], what: str) -> Costs:
        return {
            decisions: function(regime, step)
            for decisions, step in progress.track(
                networks.items(), description=f'{regime}: {what}'
            )
        }

    classifiers = each(count_classifier, 'counting classifiers')
    detectors: Costs = {}
    if settings.detector:
        detectors = each(count_detector, 'counting Mask R-CNNs')
    measured: Costs = {}
    if settings.measured:
        most = max(params for params, _ in classifiers.values())
        measured = _measure(regime, networks, settings, progress, most)
    group_of = {step: name for name, steps in GROUPS.items() for step in steps}
    rows = []
    for step in settings.steps:
        decisions, published = ROADMAP[regime][step], PUBLISHED[regime][step]
        params, flops = classifiers[decisions]
        rows.append(
            Row(
                step,
                group_of[step],
                step not in NOT_KEPT,
                published.top1,
                published.std,
                published.gflops,
                params,
                flops,
                detectors.get(decisions),
                **measured.get(decisions, {}),
            )
        )
    return rows


@torch.no_grad()
def count_classifier(regime: str, step: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a step's classifier with 1000 classes,
    at 224 x 224."""
    with torch.device('meta'):
        backbone = ModernizedResNet(
            regime, step, out_indices=3, gap_before_final_norm=True
        ).eval()
        classifier = nn.Linear(backbone.out_channels[0], NUM_CLASSES)
        with FlopCounterMode(display=False) as counter:
            (features,) = backbone(torch.zeros(1, 3, *CLASSIFIER_SHAPE))
            classifier(features)
    params = sum(p.numel() for m in (backbone, classifier) for p in m.parameters())
    return params, counter.get_total_flops() // 2


def count_detector(regime: str, step: str) -> int:
    """Multiply-accumulates of a step's Mask R-CNN, of configs/roadmap, at 800 x
    1280.

    Raises:
        ConfigError: MMDetection, or mmcv's operators, cannot be imported.
    """
    try:
        with quiet():
            import mmdet.models  # noqa: F401

            options = {'model.backbone.step': step}
            cfg = load_config(CONFIG.format(regime), cfg_options=options)
            return total(measure(cfg, DETECTOR_SHAPE)).flops
    except (ImportError, ConfigError) as error:
        raise ConfigError(
            f'Mask R-CNN cannot be counted ({error}): --no-detector leaves it out'
        ) from error


def _measure(
    regime: str,
    networks: dict[Decisions, str],
    settings: RoadmapSettings,
    progress: Progress,
    most_params: int,
) -> Costs:
    torch.set_num_threads(settings.threads)
    device = settings.device
    images = torch.rand(settings.batch, 3, *settings.size, device=device)
    # One after another they run in the same memory: all together have billions of
    # weights.
    memory = nn.init.normal_(torch.empty(most_params, device=device), std=0.02)
    built = {
        step: _in_memory(ModernizedResNet(regime, step).to(device), memory)
        for step in networks.values()
    }
    rounds = settings.warmup + settings.rounds
    turns = len(built) * (1 + 2 * rounds)
    task = progress.add_task(f'{regime}: measuring', total=turns)

    def advance() -> None:
        progress.advance(task)

    saved = {}
    for step, network in built.items():
        network.train()
        saved[step] = saved_bytes(functools.partial(network, images[:1]), network)
        advance()
    meter = Meter(device, settings.clock)
    times = []
    for make, is_training in ((_forward, False), (_train, True)):
        steps = {
            step: make(network.train(is_training), images, advance)
            for step, network in built.items()
        }
        times.append(meter.times(steps, settings.rounds, settings.warmup))
    forward, train = times
    return {
        decisions: dict(
            saved_bytes=saved[step], forward=forward[step], train=train[step]
        )
        for decisions, step in networks.items()
    }


def _in_memory(network: ModernizedResNet, memory: Tensor) -> ModernizedResNet:
    """Gives a network's kernels a place in memory, and values, that others share."""
    end = 0
    for parameter in network.parameters():
        if parameter.dim() > 1:
            start, end = end, end + parameter.numel()
            parameter.data = memory[start:end].view_as(parameter)
            end += -end % ALIGNMENT
    return network


def _forward(network: nn.Module, images: Tensor, advance: Callable[[], None]) -> Step:
    @torch.no_grad()
    def run() -> None:
        network(images)

    return Step(run, advance)


def _train(network: nn.Module, images: Tensor, advance: Callable[[], None]) -> Step:
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in network(images)]

    def run() -> None:
        torch.autograd.backward(network(images), grads)

    def reset() -> None:
        network.zero_grad(set_to_none=True)
        advance()

    return Step(run, reset)
