"""Seeing the model: its backbone, its learning rates, runs, and training data."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from .options import Command, Setting, settings_of

PROGRAM = 'convnext-mm show'


@click.group(
    epilog=f"""\b
Examples:
  {PROGRAM} backbone mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco
  {PROGRAM} lr my_config.py
  {PROGRAM} run work_dirs/one work_dirs/other
  {PROGRAM} data my_config.py --count 12
  {PROGRAM} roadmap"""
)
def command() -> None:
    """Draw a backbone, a learning rate, a run, training data, or the road from ResNet
    to ConvNeXt."""


settings_option = click.option(
    '--cfg-options',
    multiple=True,
    type=Setting(),
    callback=settings_of,
    help='Settings to override, one or several: model.backbone.arch=small '
    'key="[(1,2),(3,4)]" (no spaces inside a value).',
)
data_root_option = click.option(
    '--data-root',
    metavar='DIR',
    help="Where the data is, instead of the config's data_root.",
)


def _out_option(default: str) -> Callable[[Callable], Callable]:
    return click.option(
        '--out', metavar='DIR', help=f'Folder for pictures.  [default: {default}]'
    )


def _folder(out: str | None, work_dir: str) -> Path:
    from convnext_mm.apis.show.output import folder

    return folder(out or Path(work_dir, 'show'))


@contextlib.contextmanager
def _logs_aside() -> Iterator[None]:
    """Standard output is for results: what libraries print goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@command.command(
    'backbone',
    cls=Command,
    short_help='Stages, memory, learning rates, maps, receptive fields.',
    epilog=f"""\b
Examples:
  {PROGRAM} backbone mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco
  {PROGRAM} backbone my_config.py --shape 512 512 --json
  {PROGRAM} backbone my_config.py --checkpoint iter_40000.pth --image photo.jpg --erf
  {PROGRAM} backbone my_config.py --erf --cfg-options model.backbone.init_cfg=None""",
)
@click.argument('config')
@click.option(
    '--shape',
    type=click.IntRange(1),
    nargs=2,
    metavar='H W',
    help='Size of the image.  [default: that of convnext-mm flops; for --erf 512 512]',
)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON instead of tables.')
@click.option(
    '--checkpoint',
    metavar='FILE',
    help='Weights for --image and --erf, of any ConvNeXt checkpoint, a file or an '
    "address.  [default: those of the config's init_cfg, else initial ones]",
)
@click.option(
    '--image',
    metavar='FILE',
    help='Also draw the feature maps of a picture, which is resized to fit --shape.',
)
@click.option(
    '--erf',
    is_flag=True,
    help='Also draw the effective receptive field of each emitted map (arXiv '
    '1701.04128), with the squares that hold 50, 90 and 99 percent of it.',
)
@_out_option('work_dirs/CONFIG_NAME/show')
@settings_option
def backbone(
    config: str,
    shape: tuple[int, int] | None,
    as_json: bool,
    checkpoint: str | None,
    image: str | None,
    erf: bool,
    out: str | None,
    cfg_options: dict | None,
) -> None:
    """Show the backbone of CONFIG: ConvNeXt, isotropic ConvNeXt, or a network on the
    road from ResNet. For each stage, with the stem or downsampling layer before it and
    its output norm: parameters, FLOPs (multiply-accumulates, as in the ConvNeXt
    papers), and the memory that training keeps for backward, measured in fp32 on this
    CPU for one image. For each layer: its id, and its learning rate under the config's
    optimizer. CONFIG is a path, or the name of a recipe (`convnext-mm zoo`)."""
    from convnext_mm.analysis.complexity import default_shape
    from convnext_mm.apis.config import load_config
    from convnext_mm.apis.show import (
        build_backbone,
        describe,
        draw_feature_maps,
        draw_receptive_fields,
        feature_maps,
        load_weights,
        receptive_fields_of,
    )
    from convnext_mm.engine.errors import ConfigError

    with _logs_aside():
        cfg = load_config(config, cfg_options=cfg_options)
        build_backbone(cfg)
        try:
            size = shape or default_shape(cfg)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if checkpoint and not (image or erf):
            raise ConfigError(
                '--checkpoint gives weights for pictures: add --image FILE or --erf'
            )
        description = describe(cfg, size)
        pictures: list[Path] = []
        fields: list[Any] = []
        if image or erf:
            folder = _folder(out, cfg.work_dir)
            network = build_backbone(cfg, 'cpu')
            weights = load_weights(network, checkpoint)
            title = f'{Path(config).stem}, {weights}'
            if image:
                features = feature_maps(network, cfg, image, size)
                path = folder / f'features_{Path(image).stem}.png'
                pictures.append(draw_feature_maps(features, path, title))
            if erf:
                size_of_field = shape or (512, 512)
                fields = receptive_fields_of(network, size_of_field)
                title += ', {} x {}'.format(*size_of_field)
                pictures.append(
                    draw_receptive_fields(
                        fields, folder / 'receptive_fields.png', title
                    )
                )
    if as_json:
        _print_json(config, description, fields, pictures)
    else:
        _print_backbone(config, description, fields, pictures)


def _print_json(
    config: str, description: Any, fields: list[Any], pictures: list[Path]
) -> None:
    import json

    from convnext_mm.apis.show.backbone import FRACTIONS

    result = dict(
        config=config,
        size=description.size,
        stages=[stage._asdict() for stage in description.stages],
        layer_decay=description.layer_decay,
        layers=[layer._asdict() for layer in description.layers],
        receptive_fields=[
            dict(stage=f.stage, sides=dict(zip(map(str, FRACTIONS), f.sides)))
            for f in fields
        ],
        pictures=[str(picture) for picture in pictures],
    )
    print(json.dumps(result, indent=2))


def _print_backbone(
    config: str, description: Any, fields: list[Any], pictures: list[Path]
) -> None:
    from rich.console import Console

    from convnext_mm.apis.show.backbone import FRACTIONS

    console = Console()
    height, width = description.size
    stages = _table(
        f'{Path(config).stem}, one image of {height} x {width}',
        'stage',
        'channels',
        'blocks',
        'stride',
        'output',
        'params\n(M)',
        'FLOPs\n(G)',
        'kept\n(MiB)',
    )
    stages.caption = 'kept: by training, for backward, in fp32 on this CPU'
    for s in description.stages:
        stages.add_row(
            str(s.number),
            str(s.channels),
            str(s.depth),
            str(s.stride),
            '{} x {}'.format(*s.shape),
            f'{s.params / 1e6:.2f}',
            f'{s.flops / 1e9:.2f}',
            f'{s.saved_bytes / 2**20:.1f}',
        )
    stages.add_section()
    stages.add_row(
        'all',
        '',
        str(sum(s.depth for s in description.stages)),
        '',
        '',
        f'{sum(s.params for s in description.stages) / 1e6:.2f}',
        f'{sum(s.flops for s in description.stages) / 1e9:.2f}',
        f'{sum(s.saved_bytes for s in description.stages) / 2**20:.1f}',
        style='bold',
    )
    console.print(stages)
    if description.layers:
        layers = _table(
            'learning rates', 'layers', 'layer id', 'lr scale', 'params (M)'
        )
        for layer in description.layers:
            layers.add_row(
                layer.name,
                '-' if layer.layer_id is None else str(layer.layer_id),
                ', '.join(f'{scale:.4g}' for scale in layer.lr_scales) or 'frozen',
                f'{layer.params / 1e6:.3f}',
            )
        console.print(layers)
    console.print(description.layer_decay, soft_wrap=True)
    for field in fields:
        shares = ', '.join(
            f'{fraction:.0%} in {side}'
            for fraction, side in zip(FRACTIONS, field.sides)
        )
        console.print(
            f'stage {field.stage} sees, in squares of so many pixels: {shares}',
            soft_wrap=True,
        )
    if any(field.sides[-1] > min(field.field.shape) for field in fields):
        console.print(
            'A field reaches the border of the image: a larger --shape shows all of it',
            soft_wrap=True,
        )
    for picture in pictures:
        console.print(str(picture), soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify='right' if number else 'left', no_wrap=True)
    return table


@command.command(
    'lr',
    cls=Command,
    short_help='The learning rate of each layer, over all of training.',
    epilog=f"""\b
Examples:
  {PROGRAM} lr convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512
  {PROGRAM} lr my_config.py --epoch-length 7330
  {PROGRAM} lr my_config.py --cfg-options optim_wrapper.paramwise_cfg.decay_rate=0.8""",
)
@click.argument('config')
@click.option(
    '--epoch-length',
    type=click.IntRange(1),
    metavar='N',
    help='Iterations in an epoch.  [default: counted, from the data set where it is '
    'there, else from the known size of COCO or ImageNet, with as many processes as '
    'auto_scale_lr.base_batch_size stands for]',
)
@_out_option('work_dirs/CONFIG_NAME/show')
@data_root_option
@settings_option
def learning_rate(
    config: str,
    epoch_length: int | None,
    out: str | None,
    data_root: str | None,
    cfg_options: dict | None,
) -> None:
    """Draw the learning rate of each layer of CONFIG's model over the whole training,
    from its own optimizer constructor and schedulers. CONFIG is a path, or the name of
    a recipe (`convnext-mm zoo`)."""
    from rich.console import Console

    from convnext_mm.apis.config import load_config
    from convnext_mm.apis.config_check import check_config
    from convnext_mm.apis.show import draw_schedule, schedule_of

    with _logs_aside():
        cfg = load_config(config, data_root=data_root, cfg_options=cfg_options)
        check_config(cfg, 'train')
        schedule = schedule_of(cfg, epoch_length)
        name = Path(config).stem
        path = _folder(out, cfg.work_dir) / 'learning_rate.png'
        draw_schedule(schedule, path, name)
    length = f'{schedule.num_iterations} iterations'
    if schedule.epoch_length:
        epochs = schedule.num_iterations // schedule.epoch_length
        length = f'{epochs} epochs' + (
            '' if schedule.epochs_only else f' of {schedule.epoch_length} iterations'
        )
    table = _table(f'{name}, {length}', 'group', 'lr scale', 'start', 'peak', 'end')
    table.add_column('layers')
    for group in schedule.groups:
        table.add_row(
            group.name,
            f'{group.scale:.4g}',
            f'{group.start:.3g}',
            f'{group.peak:.3g}',
            f'{group.end:.3g}',
            group.layers,
        )
    console = Console()
    console.print(table)
    console.print(str(path), soft_wrap=True)


@command.command(
    'run',
    cls=Command,
    short_help='Losses, metrics, speed and memory of work folders.',
    epilog=f"""\b
Examples:
  {PROGRAM} run work_dirs/my_config
  {PROGRAM} run work_dirs/one work_dirs/other --out comparison""",
)
@click.argument('folders', metavar='DIR...', nargs=-1, required=True)
@_out_option('show below the first DIR')
def run(folders: tuple[str, ...], out: str | None) -> None:
    """Draw the losses, metrics, learning rate, speed and memory of one or several work
    folders into one picture. A run that was resumed is one curve."""
    from rich.console import Console

    from convnext_mm.apis.show.runs import draw_runs, main_metrics, read_run

    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    path = draw_runs(runs, _folder(out, folders[0]) / 'runs.png')
    console = Console()
    table = _table('last value (best, at iteration)', '', *(r.name for r in runs))
    numbers: list[tuple[str, Callable[[Any], float | None], str]] = [
        ('iterations', lambda run: run.iterations, '.0f'),
        ('starts', lambda run: run.attempts, '.0f'),
        ('last loss', lambda run: run.last_loss, '.4g'),
        ('median s/iteration', lambda run: run.seconds, '.3g'),
        ('max GPU memory (MB)', lambda run: run.max_memory, '.0f'),
    ]
    for name, value_of, form in numbers:
        values = [value_of(run) for run in runs]
        if any(value is not None for value in values):
            table.add_row(name, *('-' if v is None else f'{v:{form}}' for v in values))
    table.add_section()
    main = main_metrics(runs)
    finer = {name for run in runs for name in run.metrics if name not in main}
    for name in [*main, *sorted(finer)]:
        found = [run.best(name) for run in runs]
        table.add_row(
            name,
            *(
                '-' if b is None else f'{b.last:.4g} ({b.best:.4g}, {b.iteration})'
                for b in found
            ),
        )
    console.print(table)
    for r in runs:
        if r.unreadable:
            console.print(
                f'{r.name}: left out what could not be read ({r.unreadable} lines)',
                soft_wrap=True,
            )
    console.print(str(path), soft_wrap=True)


@command.command(
    'data',
    cls=Command,
    short_help='Training data, augmented, with boxes and masks.',
    epilog=f"""\b
Examples:
  {PROGRAM} data my_config.py
  {PROGRAM} data my_config.py --split val --count 16 --seed 1
  {PROGRAM} data mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco --data-root DIR""",
)
@click.argument('config')
@click.option(
    '--split',
    type=click.Choice(['train', 'val', 'test']),
    default='train',
    show_default=True,
    help='Which data set.',
)
@click.option(
    '--count',
    type=click.IntRange(1),
    default=8,
    metavar='N',
    show_default=True,
    help='How many samples.',
)
@click.option(
    '--seed',
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    metavar='N',
    show_default=True,
    help='Of the choice of samples and of augmentation.',
)
@_out_option('work_dirs/CONFIG_NAME/show')
@data_root_option
@settings_option
def data(
    config: str,
    split: str,
    count: int,
    seed: int,
    out: str | None,
    data_root: str | None,
    cfg_options: dict | None,
) -> None:
    """Draw samples of CONFIG's data as they leave its pipeline, augmented, with their
    boxes and masks, or classes. What the model does to whole batches (padding,
    normalisation, mixing) comes later. CONFIG is a path, or the name of a recipe
    (`convnext-mm zoo`)."""
    from convnext_mm.apis.config import load_config
    from convnext_mm.apis.show import draw_samples, write_samples

    with _logs_aside():
        cfg = load_config(config, data_root=data_root, cfg_options=cfg_options)
        samples = draw_samples(cfg, split, count, seed)
        folder = _folder(out, cfg.work_dir) / f'data_{split}'
        title = f'{Path(config).stem}, {split}, seed {seed}'
        picture = write_samples(samples, folder, title)
    print(f'{len(samples)} samples: {picture}, each alone in {folder}')


@command.command(
    'roadmap',
    cls=Command,
    short_help='The steps from ResNet to ConvNeXt: accuracy and costs.',
    epilog=f"""\b
Examples:
  {PROGRAM} roadmap
  {PROGRAM} roadmap --regime resnet50 resnet200 --no-measure --out pictures
  {PROGRAM} roadmap --steps resnet depthwise-conv 'kernel size 7' --size 512 512
  {PROGRAM} roadmap --device cuda --batch 64 --rounds 20 --json""",
)
@click.option(
    '--regime',
    multiple=True,
    metavar='NAME',
    help='resnet50 (to ConvNeXt-T), resnet200 (to ConvNeXt-B), or both.  '
    '[default: resnet50]',
)
@click.option(
    '--steps', multiple=True, metavar='STEP', help='Some of them.  [default: all]'
)
@click.option(
    '--no-detector', is_flag=True, help='Count no Mask R-CNN, which needs MMDetection.'
)
@click.option('--no-measure', is_flag=True, help='Measure neither memory nor time.')
@click.option(
    '--size',
    type=int,
    nargs=2,
    metavar='H W',
    help='Of the images that are measured with.  [default: 224 224]',
)
@click.option('--batch', type=int, help='Of them, for times.  [default: 1]')
@click.option('--rounds', type=int, help='Measured rounds, at least 2.  [default: 5]')
@click.option('--device', type=click.Choice(['cpu', 'cuda']), help='[default: cpu]')
@click.option(
    '--clock',
    type=click.Choice(['wall', 'cpu']),
    help='cpu: time spent computing, for one thread on a busy machine.  '
    '[default: wall]',
)
@click.option('--threads', type=int, help='Of the CPU.  [default: 1]')
@click.option('--json', 'as_json', is_flag=True, help='Print JSON instead of tables.')
@click.option(
    '--out', metavar='DIR', help='Folder for a picture of each regime.  [default: none]'
)
@click.pass_context
def roadmap(
    ctx: click.Context,
    /,
    no_detector: bool,
    no_measure: bool,
    as_json: bool,
    out: str | None,
    **options: Any,
) -> None:
    """Show the steps from ResNet to ConvNeXt (arXiv 2201.03545, section 2): published
    ImageNet-1K accuracy; FLOPs (multiply-accumulates) and parameters of the
    classifier, and FLOPs of a Mask R-CNN, counted here; and, of the backbone, the
    memory that training keeps for backward, in fp32 for one image, and the time of a
    batch, forward and in a train step without the optimizer, measured on this
    machine. Networks take turns, so that what else the machine does hits all
    alike."""
    import shlex

    from convnext_mm.apis.show import (
        RoadmapSettings,
        as_dict,
        conditions,
        draw_roadmap,
        walk,
    )

    given = {k: v for k, v in options.items() if v not in (None, ())}
    settings = RoadmapSettings(
        **given, detector=not no_detector, measured=not no_measure
    )
    pictures: list[Path] = []
    with _logs_aside():
        folder = _folder(out, '') if out else None
        regimes = walk(settings)
        if folder:
            pictures = [
                draw_roadmap(
                    name, rows, folder / f'roadmap_{name}.png', conditions(settings)
                )
                for name, rows in regimes.items()
            ]
    if as_json:
        import json

        words = shlex.join(['convnext-mm', 'show', 'roadmap', *ctx.meta['arguments']])
        result = as_dict(settings, regimes, words)
        print(json.dumps({**result, 'pictures': [*map(str, pictures)]}, indent=1))
    else:
        _print_roadmap(regimes, conditions(settings), pictures)


def _print_roadmap(
    regimes: dict[str, list[Any]], conditions: str, pictures: list[Path]
) -> None:
    from rich.console import Console

    from convnext_mm.apis.show.roadmap_facts import ENDS, PEERS, SOURCE

    console = Console()
    for regime, rows in regimes.items():
        console.print(_counted(rows, 'From {} to {}'.format(*ENDS[regime])))
        peer = PEERS[regime]
        notes = [
            f'Published ({SOURCE}): top 1, GFLOPs of the paper; {peer.name} has '
            f'{peer.top1} with {peer.gflops} GFLOPs.'
        ]
        if not all(row.is_kept for row in rows):
            notes.append('(x): tried, and not kept.')
        if not all(row.is_printed for row in rows):
            notes.append('*: not what the layers need, see docs/roadmap.md.')
        console.print(' '.join(notes), soft_wrap=True, highlight=False)
        if rows[0].train:
            console.print(_measured(rows))
            console.print(
                f'Medians, and what they are of the first row: {conditions}',
                soft_wrap=True,
                highlight=False,
            )
    for picture in pictures:
        console.print(str(picture), soft_wrap=True)


def _step(row: Any) -> str:
    return row.step if row.is_kept else f'{row.step} (x)'


def _counted(rows: list[Any], title: str) -> Any:
    columns = ['step', 'top 1', 'GFLOPs\npaper', 'GFLOPs', 'params\n(M)']
    has_detector = rows[0].detector_flops is not None
    table = _table(title, *columns, *['Mask R-CNN\nGFLOPs'] * has_detector)
    for row in rows:
        cells = [
            _step(row),
            f'{row.top1:.2f}'
            + (f' ± {row.std:.2f}' if row.std is not None else ' ' * 7),
            f'{row.printed_gflops:.2f}{" " if row.is_printed else "*"}',
            f'{row.flops / 1e9:.2f}',
            f'{row.params / 1e6:.2f}',
        ]
        if has_detector:
            cells.append(f'{row.detector_flops / 1e9:.1f}')
        table.add_row(*cells)
    return table


def _measured(rows: list[Any]) -> Any:
    table = _table(
        'Backbones', 'step', 'kept\n(MiB)', 'forward\n(ms)', '', 'train step\n(ms)', ''
    )
    first = rows[0]
    for row in rows:
        cells = [_step(row), f'{row.saved_bytes / 2**20:.1f}']
        for times, start in ((row.forward, first.forward), (row.train, first.train)):
            ratio = times['median_ms'] / start['median_ms']
            cells += [f'{times["median_ms"]:.1f}', f'{ratio:.2f}']
        table.add_row(*cells)
    return table
