"""Converting data sets."""

from pathlib import Path
from typing import Any

import click

from .options import Command

PLACES = 3  # shown of each note


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm convert-data VOCdevkit/VOC2007 data/own
  convnext-mm convert-data datasets/coco128 data/own
  convnext-mm convert-data labelled data/own --from voc --held-out 10
  convnext-mm convert-data datasets/coco128/data.yaml data/own --skip-mistakes""",
)
@click.argument('source', metavar='SRC', type=click.Path(path_type=Path))
@click.argument('target', metavar='DST', type=click.Path(path_type=Path))
@click.option(
    '--from',
    'kind',
    type=click.Choice(['voc', 'yolo']),
    help='Format of SRC.  [default: what lies there]',
)
@click.option(
    '--held-out',
    type=click.IntRange(0, 90),
    default=20,
    show_default=True,
    metavar='PERCENT',
    help='Training pictures that become validation pictures where SRC names none.',
)
@click.option(
    '--in-place',
    is_flag=True,
    help='Make no links to the pictures: annotations name them where they are.',
)
@click.option(
    '--skip-mistakes',
    is_flag=True,
    help='Leave out objects and pictures with mistakes, and list them; without it '
    'nothing is written.',
)
@click.option(
    '--classes',
    multiple=True,
    metavar='NAME',
    help='Pascal VOC: classes in the order that they shall have, one or several.  '
    '[default: those that are met, sorted]',
)
@click.option(
    '--masks',
    is_flag=True,
    help='Pascal VOC: the pictures of ImageSets/Segmentation, with masks from '
    'SegmentationObject.',
)
@click.option(
    '--first-pixel',
    type=click.IntRange(0, 1),
    help='Pascal VOC: what coordinates count from.  [default: 1, or 0 where a '
    'coordinate is 0]',
)
def command(source: Path, target: Path, **options: Any) -> None:
    """Bring Pascal VOC or YOLO annotations into COCO format: SRC is the folder of a
    data set, or YOLO's data.yaml. DST gets train.json and val.json, and in train/ and
    val/ links to the pictures. Says what it found, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from convnext_mm.apis.convert_data import convert_data

    report = convert_data(source, target, **options)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for mistake in report.findings.mistakes:
        console.print(f'left out: {mistake}')
    for kind, places in report.findings.notes.items():
        shown = ', '.join(places[:PLACES]) + ', ...' * (len(places) > PLACES)
        console.print(f'{kind}: {len(places)} ({shown})')
    splits = report.splits
    table = Table(report.kind, *splits, box=None, pad_edge=False)
    for name, values in (
        ('pictures', [split.pictures for split in splits.values()]),
        ('  without objects', [split.empty for split in splits.values()]),
        ('objects', [split.objects for split in splits.values()]),
        ('  with a mask', [split.with_mask for split in splits.values()]),
        *(
            (f'  {label}', [split.by_class[label] for split in splits.values()])
            for label in report.classes
        ),
    ):
        table.add_row(name, *map(str, values))
    console.print(table)
    console.print(_next_steps(report, target))


def _next_steps(report: Any, target: Path) -> str:
    lines = [
        'Written: ' + ', '.join(str(split.file) for split in report.splits.values()),
        'In a copy of configs/custom/own-small-data_atss_convnext-atto.py write',
        f"  data_root = '{target.as_posix().rstrip('/')}/'",
        f'  classes = {tuple(report.classes)}',
    ]
    if report.in_place:
        lines.append("  train_images = val_images = ''")
    return '\n'.join(
        [
            *lines,
            'and then',
            '  convnext-mm show data YOUR_COPY.py',
            '  convnext-mm train YOUR_COPY.py',
        ]
    )
