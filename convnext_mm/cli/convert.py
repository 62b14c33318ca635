"""Converting checkpoints."""

from pathlib import Path
from typing import Any

import click

from .options import Command


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm convert timm://convnext_tiny.fb_in22k tiny.safetensors
  convnext-mm convert iter_160000.pth backbone.pth
  convnext-mm convert dino.pth teacher.pth --prefix teacher.backbone.""",
)
@click.argument('source', metavar='SRC')
@click.argument('target', metavar='DST', type=click.Path(path_type=Path))
@click.option(
    '--prefix',
    help='Which network, where the checkpoint holds several, such as '
    "'teacher.backbone.'.",
)
@click.option(
    '--trust-pickle',
    is_flag=True,
    help='Run whatever the pickle holds: only for a file you made yourself.',
)
def command(source: str, target: Path, **options: Any) -> None:
    """Convert the ConvNeXt in a checkpoint of any known family to this package's
    names, and report what was used and what was left out. SRC is a file, https://...,
    hf://org/name[/file] or timm://name; DST ends in .pth, .pt or .safetensors."""
    from convnext_mm.apis.convert import convert_file
    from convnext_mm.checkpoint.errors import shown, summarise

    report = convert_file(source, target, **options)
    spec = report.spec
    rows = [
        ('source', shown(source)),
        ('family', f'{report.family.name}: {report.family.origin}'),
        ('found behind', report.prefix or 'no prefix'),
        ('averaged (EMA)', 'yes' if report.averaged else 'no'),
        ('network', f'{spec}{" (use_grn=True)" if spec.use_grn else ""}'),
        ('depths, channels', f'{spec.depths}, {spec.channels}'),
        (
            'first layer',
            f'{spec.in_channels} channels, patches of {spec.stem_patch_size}',
        ),
        ('used', f'{len(report.used)} tensors'),
    ]
    rows += [
        ('left out' if i == 0 else '', f'{kind}: {summarise(keys)}')
        for i, (kind, keys) in enumerate(report.leftovers.items())
    ]
    if report.not_finite:
        rows.append(('WARNING', f'NaN or Inf: {summarise(report.not_finite, 10)}'))
    for name, value in [*rows, ('written', shown(target))]:
        click.echo(f'{name:17} {value}')
