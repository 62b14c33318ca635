"""From pictures to objects and masks."""

import signal
import sys
from typing import Any

import click

from .options import Command, Setting, complete_model, settings_of

SHOWN = 5  # of a list of names


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm infer mask-rcnn_convnext-t photo.jpg holiday/ 'more/*.png'
  convnext-mm infer upernet_convnext-b street.mp4 --every 5 --out street
  convnext-mm infer work_dirs/my_config photo.jpg --score 0.5
  convnext-mm infer my_config.py photo.jpg --checkpoint iter_40000.pth --tta
  convnext-mm infer mask-rcnn_convnext-t val2017/ --ground-truth instances.json
  cat photo.jpg | convnext-mm infer mask-rcnn_convnext-t -
  convnext-mm infer mask-rcnn_convnext-t camera --limit 100""",
)
@click.argument('model', shell_complete=complete_model)
@click.argument('sources', nargs=-1, required=True, type=click.Path())
@click.option('--checkpoint', metavar='FILE', help='Weights, where MODEL is a config.')
@click.option(
    '--out',
    metavar='DIR',
    default='outputs',
    show_default=True,
    help='Folder for pictures, predictions.json (COCO format), predictions.csv and '
    'class maps.',
)
@click.option(
    '--score',
    type=float,
    default=0.3,
    show_default=True,
    help='Leave out objects with lower scores.',
)
@click.option('--device', help='Such as cpu or cuda:1.  [default: the best there is]')
@click.option(
    '--batch', type=int, default=1, show_default=True, help='Pictures at once.'
)
@click.option('--tta', is_flag=True, help='Average over scales and flips.')
@click.option(
    '--deploy/--no-deploy',
    default=True,
    help='Fold and pack the backbone first; the default.',
)
@click.option('--no-pictures', is_flag=True, help='Write predictions only.')
@click.option('--no-data', is_flag=True, help='Write pictures only.')
@click.option(
    '--ground-truth',
    metavar='PATH',
    help='Draw annotations beside: a json file in COCO format, or a folder of class '
    'maps.',
)
@click.option(
    '--opacity',
    type=float,
    default=0.5,
    show_default=True,
    help='Of the colours over a picture.',
)
@click.option('--no-labels', is_flag=True, help="No names in a segmentor's pictures.")
@click.option(
    '--every',
    type=int,
    default=1,
    show_default=True,
    help='Of videos, only each so many-th frame.',
)
@click.option('--limit', type=int, metavar='N', help='Stop after N pictures.')
@click.option(
    '--cfg-options',
    multiple=True,
    type=Setting(),
    callback=settings_of,
    help='Settings of the config to override.',
)
def command(
    sources: tuple[str, ...],
    no_pictures: bool,
    no_data: bool,
    no_labels: bool,
    out: str,
    **options: Any,
) -> int:
    """Find objects, or segment, in SOURCES with MODEL.

    MODEL is the name of a trained model (`convnext-mm zoo --trained`), whose weights
    are fetched once; a config, with --checkpoint; or a work folder of a training.
    SOURCES are files, folders, patterns, addresses, videos, camera (camera:1), or -
    for standard input. Pictures that cannot be used are named at the end, and the
    status is then 1."""
    from convnext_mm.apis.inference import Inference, infer

    result = Inference()
    # As `timeout` and Slurm stop a program.
    before = signal.signal(
        signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT)
    )
    try:
        infer(
            source=list(sources),
            out=out,
            pictures=not no_pictures,
            data=not no_data,
            with_labels=not no_labels,
            keep=False,
            result=result,
            **options,
        )
    except KeyboardInterrupt:
        _report(result, out, options['score'])
        print('Stopped: what was found until then is written.', file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    _report(result, out, options['score'])
    return 1 if result.failures else 0


def _report(result: Any, out: str, score: float) -> None:
    from rich.console import Console

    from convnext_mm.checkpoint.errors import shown

    console = Console(soft_wrap=True, highlight=False)
    for note, count in result.notes.items():
        more = f' and {count - 1} more' if count > 1 else ''
        console.print(f'{shown(result.noted[note])}{more}: {note}', markup=False)
    each = result.seconds / max(1, result.pictures)
    speed = f'{1 / each:.1f} a second' if 0 < each < 1 else f'{each:.1f} s each'
    most = ', '.join(f'{n} {name}' for name, n in result.objects.most_common(SHOWN))
    pictures = f'{result.pictures} picture{"s" * (result.pictures != 1)}'
    console.print(
        f'{pictures}, {speed}'
        + (
            f': {most}'
            if most
            else f': nothing was found with a score of {score} or more'
        )
        + (', ...' if len(result.objects) > SHOWN else ''),
        markup=False,
    )
    console.print(f'written to {out}', markup=False)
    for failure in result.failures[:SHOWN]:
        print(f'not used: {failure}', file=sys.stderr)
    if len(result.failures) > SHOWN:
        print(f'not used: {len(result.failures) - SHOWN} more', file=sys.stderr)
