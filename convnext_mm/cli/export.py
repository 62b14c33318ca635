"""Models as files for other programs."""

from typing import Any

import click

from .options import Command, Setting, complete_model, settings_of

SHOWN = 12  # of a file's operators


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm export work_dirs/demo
  convnext-mm export upernet_convnext-t --to torch-export --dtype fp16
  convnext-mm export mask-rcnn_convnext-t --shape 800 1344 --out mask-rcnn.onnx
  convnext-mm export my_config.py --checkpoint iter_40000.pth --part backbone
  convnext-mm export work_dirs/demo --int8 data/shapes/images/training""",
)
@click.argument('model', shell_complete=complete_model)
@click.option(
    '--to',
    default='onnx',
    show_default=True,
    metavar='TARGET',
    help='onnx, torch-export (.pt2), or torchscript.',
)
@click.option('--checkpoint', metavar='FILE', help='Weights, where MODEL is a config.')
@click.option(
    '--out', metavar='FILE', help='The file.  [default: in outputs/, by its model]'
)
@click.option(
    '--part',
    default='model',
    show_default=True,
    metavar='PART',
    help='The whole model, or its backbone alone.',
)
@click.option(
    '--dtype',
    default='fp32',
    show_default=True,
    metavar='DTYPE',
    help='fp32, or fp16 for weights and maps; inputs and results stay in fp32.',
)
@click.option(
    '--int8',
    metavar='DIR',
    help='Quantise products; ranges are those of the pictures in DIR (ONNX only).',
)
@click.option(
    '--shape',
    type=int,
    nargs=2,
    metavar='H W',
    help='Fix height and width.  [default: any]',
)
@click.option(
    '--opset',
    type=int,
    default=20,
    show_default=True,
    help="Version of ONNX's operators.",
)
@click.option(
    '--images',
    multiple=True,
    metavar='PATH',
    help='Pictures, or folders of them, to compare file and model on.  [default: '
    'drawn shapes]',
)
@click.option(
    '--check/--no-check',
    default=True,
    help='Run the file in another process, without this package, and compare; the '
    'default.',
)
@click.option(
    '--cfg-options',
    multiple=True,
    type=Setting(),
    callback=settings_of,
    help='Settings of the config to override.',
)
def command(model: str, shape: tuple[int, int] | None, **options: Any) -> None:
    """Write MODEL, folded, to a file that runs without this package: for ONNX
    Runtime, torch.export or TorchScript. MODEL is what `convnext-mm infer` takes.

    The file is then run in another process and compared with the model on several
    sizes; what it holds, how far it is from the model and how fast it is beside it
    is printed."""
    from rich.console import Console

    from convnext_mm.apis.export import export

    console = Console(soft_wrap=True, highlight=False)
    with Console(stderr=True).status(f'exporting {model}: a minute or more'):
        result = export(model, shape=shape, **options)
    shown = [f'{count} {name}' for name, count in result.operators.most_common(SHOWN)]
    left = len(result.operators) - len(shown)
    rows = [
        ('written', f'{result.path}, {result.bytes / 1e6:.1f} MB'),
        ('takes', result.inputs),
        ('gives', ', '.join(result.outputs)),
        ('operators', ', '.join(shown) + (f', {left} other kinds' if left > 0 else '')),
    ]
    rows += [(name, value) for name, value in _differences(result.differences)]
    if result.time is not None:
        rows.append(
            (
                'time',
                f"{result.time:.2f} of the deployed model's in PyTorch, on this CPU",
            )
        )
    else:
        rows.append(('not checked', 'leave --no-check out to compare it'))
    for name, value in rows:
        console.print(f'{name:12} {value}', markup=False)


def _differences(found: dict[str, float]) -> list[tuple[str, str]]:
    """Lines for a person."""
    rows = []
    if 'largest' in found:
        rows.append(('difference', f'{found["largest"]:.1e} of the largest value'))
    if 'classes' in found:
        rows.append(('', f'{found["classes"]:.2%} of the pixels have another class'))
    if 'objects' in found:
        text = f'{found["objects"]:.0f} objects'
        if not found['objects']:
            text += ': nothing was compared; give pictures with --images'
        elif found['unmatched']:
            text += f', {found["unmatched"]:.0f} of them not alike'
        rows.append(('compared', text))
    if 'boxes' in found:
        rows.append(('difference', f'{found["boxes"]:.1e} pixels of boxes'))
        rows.append(('', f'{found["scores"]:.1e} of scores'))
    if 'masks' in found:
        rows.append(('', f"{found['masks']:.2%} of a mask's pixels"))
    return rows
