#!/usr/bin/env python3
"""Measures what the residual stream between blocks could be kept in under bf16
autocast: fp32, as now, bf16, or the sum of two bf16 numbers. Prints relative errors of
ConvNeXt-T's four maps against fp64, random weights and images, on a CPU."""

import argparse
import json
from pathlib import Path

STREAMS = ('fp32', 'bf16', 'pair')


def rounded(x, stream: str):
    if stream == 'fp32':
        return x
    high = x.bfloat16()
    if stream == 'bf16':
        return high.float()
    return high.float() + (x - high.float()).bfloat16().float()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='json file to write')
    parser.add_argument('--arch', default='tiny')
    parser.add_argument('--size', type=int, default=192, help='of two square images')
    args = parser.parse_args(argv)
    import torch

    from convnext_mm import ConvNeXt
    from convnext_mm.models.block import Block

    rows = []
    for layer_scale in (1e-6, 0.1, 1.0):
        torch.manual_seed(0)
        model = ConvNeXt(args.arch, impl='eager', layer_scale_init_value=layer_scale)
        x = torch.randn(2, 3, args.size, args.size)
        with torch.no_grad():
            exact = model.eval().double()(x.double())
            model.float()
            for stream in STREAMS:
                hooks = [
                    block.register_forward_hook(
                        lambda _, inputs, out, stream=stream: rounded(out, stream)
                    )
                    for block in model.modules()
                    if isinstance(block, Block)
                ]
                with torch.autocast('cpu', torch.bfloat16):
                    got = model(x)
                for hook in hooks:
                    hook.remove()
                errors = [
                    ((ours.double() - e).norm() / e.norm()).item()
                    for ours, e in zip(got, exact)
                ]
                rows.append(dict(layer_scale=layer_scale, stream=stream, errors=errors))
                print(rows[-1])
    args.out.write_text(
        json.dumps(
            dict(
                command='python tools/maintenance/measure_residual_stream.py '
                f'{args.out.name} --arch {args.arch} --size {args.size}',
                versions=dict(torch=torch.__version__),
                rows=rows,
            ),
            indent=1,
        )
        + '\n'
    )
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
