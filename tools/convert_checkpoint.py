"""Converts the ConvNeXt in a checkpoint of any known family to this package's
names, and reports what was used and what was left out."""
import argparse
import os
import sys
from pathlib import Path
from typing import Dict, Set

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convnext_mm.checkpoint import CheckpointError, CheckpointFileError
from convnext_mm.checkpoint.convert import Report, check_complete
from convnext_mm.checkpoint.errors import shown
from convnext_mm.checkpoint.load import read_backbone, without_final_norm


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='SRC', help='a file, https://..., '
                        'hf://org/name[/file] or timm://name')
    parser.add_argument('target', metavar='DST', type=Path,
                        help='file to write, .pth, .pt or .safetensors')
    parser.add_argument('--prefix', help='which network, where the checkpoint '
                        "holds several, such as 'teacher.backbone.'")
    parser.add_argument(
        '--trust-pickle', action='store_true', help='run whatever the pickle '
        'holds: only for a file you made yourself')
    return parser.parse_args(argv)


def convert_file(args: argparse.Namespace) -> Report:
    """Reads, checks, converts and writes; gives what was found.

    Raises:
        CheckpointError: The source is not a complete ConvNeXt.
    """
    state, report = read_backbone(args.source, args.prefix, args.trust_pickle)
    check_complete(state, report)
    state = own_memory(without_final_norm(state, report))
    # Written beside and then renamed: the source may be the same file.
    partial = args.target.with_name(f'{args.target.name}.{os.getpid()}.tmp')
    try:
        if args.target.suffix == '.safetensors':
            save_file(state, partial, metadata=dict(format='pt'))
        else:
            torch.save(
                dict(state_dict=state, meta=dict(
                    family=report.family.name, arch=report.spec.arch)),
                partial)
        os.replace(partial, args.target)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointFileError(
            f'{shown(args.target)} cannot be written ({shown(error)}); is the '
            'disk full?') from error
    finally:
        partial.unlink(missing_ok=True)
    return report


def own_memory(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Each tensor without what else lies in its memory: other parameters where
    all are views of one buffer, the same one where two names share it."""
    seen: Set[int] = set()
    result = {}
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() > tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def print_report(args: argparse.Namespace, report: Report) -> None:
    spec = report.spec
    rows = [
        ('source', shown(args.source)),
        ('family', f'{report.family.name}: {report.family.origin}'),
        ('found behind', report.prefix or 'no prefix'),
        ('averaged (EMA)', 'yes' if report.averaged else 'no'),
        ('arch', f'{spec.arch}, {"V2 (use_grn=True)" if spec.use_grn else "V1"}'
         ),
        ('depths, channels', f'{spec.depths}, {spec.channels}'),
        ('first layer', f'{spec.in_channels} channels, patches of '
         f'{spec.stem_patch_size}'),
        ('used', f'{len(report.used)} tensors'),
    ]
    rows += [(f'{"left out" if i == 0 else ""}',
              f'{len(keys)} {label}: {", ".join(keys[:3])}'
              f'{", ..." if len(keys) > 3 else ""}')
             for i, (label, keys) in enumerate(report.leftovers.items())]
    if report.not_finite:
        rows.append(('WARNING', f'{len(report.not_finite)} weights hold NaN '
                     f'or Inf: {", ".join(report.not_finite[:10])}'))
    rows.append(('written', shown(args.target)))
    for name, value in rows:
        print(f'{name:17} {value}')


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.target.suffix not in ('.pth', '.pt', '.safetensors'):
        print(f'error: DST must end in .pth, .pt or .safetensors, got '
              f'{shown(args.target)}', file=sys.stderr)
        return 1
    if not args.target.parent.is_dir():
        print(f'error: the folder {shown(args.target.parent)} does not exist; '
              'make it first', file=sys.stderr)
        return 1
    try:
        report = convert_file(args)
    except CheckpointError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print_report(args, report)
    return 0


if __name__ == '__main__':
    sys.exit(main())
