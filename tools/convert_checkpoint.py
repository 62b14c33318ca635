"""Converts the ConvNeXt in a checkpoint of any known family to this package's
names, and reports what was used and what was left out."""

import argparse
import sys
from pathlib import Path

from convnext_mm.apis.convert import SUFFIXES, convert_file
from convnext_mm.checkpoint import CheckpointError
from convnext_mm.checkpoint.convert import Report
from convnext_mm.checkpoint.errors import shown, summarise


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'source',
        metavar='SRC',
        help='a file, https://..., hf://org/name[/file] or timm://name',
    )
    parser.add_argument(
        'target', metavar='DST', type=Path, help=f'file to write: {", ".join(SUFFIXES)}'
    )
    parser.add_argument(
        '--prefix',
        help='which network, where the checkpoint '
        "holds several, such as 'teacher.backbone.'",
    )
    parser.add_argument(
        '--trust-pickle',
        action='store_true',
        help='run whatever the pickle holds: only for a file you made yourself',
    )
    return parser.parse_args(argv)


def print_report(args: argparse.Namespace, report: Report) -> None:
    spec = report.spec
    rows = [
        ('source', shown(args.source)),
        ('family', f'{report.family.name}: {report.family.origin}'),
        ('found behind', report.prefix or 'no prefix'),
        ('averaged (EMA)', 'yes' if report.averaged else 'no'),
        ('arch', f'{spec.arch}, {"V2 (use_grn=True)" if spec.use_grn else "V1"}'),
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
    rows.append(('written', shown(args.target)))
    for name, value in rows:
        print(f'{name:17} {value}')


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        report = convert_file(**vars(args))
    except CheckpointError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_report(args, report)
    return 0


if __name__ == '__main__':
    sys.exit(main())
