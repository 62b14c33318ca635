#!/usr/bin/env python3
"""Counts the work of the Triton kernels of one ConvNeXt block, without a GPU.

Every launch of both directions is compiled for GPUs of compute capability 8.0 and
9.0. The machine code is disassembled, and each loop's instructions are counted as
often as it runs. What PyTorch's operators do in between counts as bytes: their inputs
and outputs, once each. With the rates of a GPU that gives the least time of each
launch: that of its bytes or of its instructions, whichever is longer.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from check_kernels import (
    AbsentDevice,
    Recorder,
    cuobjdump,
    print_table,
    resource_usage,
    zero_weights,
)

# An H200: measured bandwidth of a copy; 4 schedulers on each of 132 multiprocessors,
# 1.755 GHz.
BANDWIDTH = 4.3e12
ISSUES = 132 * 4 * 1.755e9
# What launches are for: by direction, and in the order of those of a name.
STEPS = {
    ('forward', 'depthwise_kernel'): ['depthwise convolution, LayerNorm'],
    ('forward', 'layer_norm_kernel'): ['depthwise convolution, LayerNorm'],
    ('forward', 'linear_kernel'): ['W1, GELU', 'W2, residual'],
    ('backward', 'scaled_kernel'): ['gradient scaled and cast'],
    ('backward', 'linear_kernel'): ["W2, GELU's derivative"],
    ('backward', 'product_kernel'): ['gradient of W2', 'gradient of W1'],
    ('backward', 'pwconv2_grads_kernel'): ['gradient of W2'],
    ('backward', 'aten::mm'): ['W1'],
    ('backward', 'layer_norm_backward_kernel'): ['LayerNorm'],
    ('backward', 'depthwise_kernel'): ['depthwise input'],
    ('backward', 'depthwise_weight_grad_kernel'): ['depthwise weight'],
}
OTHERS = "PyTorch's other operators"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out', type=Path, help='json file to write')
    parser.add_argument('--channels', type=int, default=96)
    parser.add_argument(
        '--map',
        type=int,
        nargs=3,
        default=(2, 200, 336),
        metavar=('N', 'H', 'W'),
        help='samples, height, width; the default is the first stage of 2 x 800 x 1344',
    )
    parser.add_argument('--sm', type=int, nargs='+', default=(80, 90))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    records = [
        record
        for architecture in args.sm
        for record in count(architecture, args.channels, args.map)
    ]
    result = dict(
        command=f'python tools/maintenance/count_work.py {args.out} '
        f'--channels {args.channels} --map {" ".join(map(str, args.map))}',
        rates=dict(bytes_per_second=BANDWIDTH, warp_instructions_per_second=ISSUES),
        records=records,
    )
    args.out.write_text(json.dumps(result, indent=1) + '\n')
    print_table([dict(record, ok=True) for record in records])
    for architecture in args.sm:
        least = sum(r['least_us'] for r in records if r['sm'] == architecture)
        print(f'compute capability {architecture / 10}: {least:.0f} us at least')
    return 0


def count(architecture: int, channels: int, size: tuple[int, int, int]) -> list[dict]:
    """One record for each launch of a block under bf16 autocast, and for PyTorch's
    operators in each direction together."""
    import torch
    import triton
    from torch.utils._python_dispatch import TorchDispatchMode

    from convnext_mm.ops import fused
    from convnext_mm.ops.triton import kernels, launch, operators
    from convnext_mm.ops.weights import BlockNeeds

    triton.runtime.driver.set_active(AbsentDevice(architecture))
    launch.programs_at_once = lambda: 528
    # Of products the first kernel, of what else there is the first.
    launch.fastest = lambda key, rows, candidates, run: next(
        (c for c in candidates if c is not None), None
    )
    launches = []

    class Launches(Recorder):
        def __getitem__(self, grid):
            def start(*args, **kwargs) -> None:
                compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
                named = dict(zip(self.kernel.arg_names, args), **kwargs)
                launches.append((self.kernel.__name__, grid, named, compiled))

            return start

    originals = {n: getattr(kernels, n) for n in dir(kernels) if n.endswith('_kernel')}
    for name, kernel in originals.items():
        setattr(kernels, name, Launches(kernel, []))

    class Others(TorchDispatchMode):
        """PyTorch's operators that read and write memory."""

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **kwargs or {})
            name = operator.overloadpacket.__name__
            moved = 0
            outputs = out if isinstance(out, (tuple, list)) else [out]
            is_view = operator.is_view or name == '_unsafe_view'
            if not (is_view or name.startswith(('empty', 'new_empty'))):
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                tensors += [t for t in outputs if isinstance(t, torch.Tensor)]
                moved = sum(t.numel() * t.element_size() for t in tensors)
            if moved:
                launches.append((name, moved))
            return out

    try:
        n, height, width = size
        weights = zero_weights(channels, device='meta')
        x = torch.empty(n, channels, height, width, device='meta').contiguous(
            memory_format=torch.channels_last
        )
        settings = (torch.ones(n, device='meta'), 1e-6, 1)  # drop scale, eps, dilation
        needs = BlockNeeds(*[True] * len(BlockNeeds._fields))
        with Others():
            out, cast, maps, hidden = operators._forward(
                x, weights, *settings, torch.bfloat16, fused.KEEP_ALL
            )
            forward = len(launches)
            operators._backward(
                out, cast, maps, hidden, weights, *settings, torch.float32, needs
            )
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)
    records = []
    seen: Counter[tuple[str, str]] = Counter()
    for i, entry in enumerate(launches):
        record = of_kernel(*entry) if len(entry) > 2 else of_operator(*entry)
        key = 'forward' if i < forward else 'backward', record['launch']
        steps = STEPS.get(key, [])
        step = steps[seen[key]] if seen[key] < len(steps) else OTHERS
        seen[key] += 1
        records.append(dict(sm=architecture, direction=key[0], step=step) | record)
    return records


def of_operator(name: str, moved: int) -> dict:
    """A record of an operator of PyTorch, of which only bytes are known."""
    return dict(
        launch=f'aten::{name}', bytes=moved, least_us=round(moved / BANDWIDTH * 1e6, 1)
    )


def of_kernel(name: str, grid: tuple[int, ...], args: dict, compiled) -> dict:
    """A record of a launch."""
    import math

    import torch

    code = instructions(compiled.asm['cubin'])
    executed = executions(code, trips(name, grid, args))
    totals: Counter[str] = Counter()
    for (_, text), times in zip(code, executed):
        totals['all'] += times
        totals[operation(text)] += times
    warps = math.prod(grid) * compiled.metadata.num_warps
    # What is written over counts twice: it is an argument twice.
    moved = sum(
        value.numel() * value.element_size()
        for value in args.values()
        if isinstance(value, torch.Tensor)
    )
    issued = warps * totals['all']
    usage = resource_usage(compiled.asm['cubin'])
    return dict(
        launch=name,
        bytes=moved,
        warp_instructions=issued,
        per_multiply_add=(
            round(totals['all'] / totals['FFMA'], 2) if totals['FFMA'] else None
        ),
        registers=usage['REG'],
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        least_us=round(max(moved / BANDWIDTH, issued / ISSUES) * 1e6, 1),
    )


def trips(name: str, grid: tuple[int, ...], args: dict) -> tuple[int, ...]:
    """How often the loops of a kernel run, the outer one first."""
    import triton

    def blocks(values: int, size: int) -> int:
        return triton.cdiv(values, size)

    match name:
        case 'depthwise_kernel':
            return (args['strip'] + args['KERNEL'] - 1,)
        case 'depthwise_weight_grad_kernel':
            walks = blocks(args['strips'], grid[1] * args['LANES'])
            return walks, args['strip'] + args['KERNEL'] - 1
        case 'linear_kernel':
            return (blocks(args['inner'], args['BLOCK_K']),)
        case 'product_kernel':
            return (blocks(blocks(args['rows'], args['BLOCK_K']), grid[1]),)
        case 'gelu_backward_kernel' | 'gelu_sums_kernel':
            return (blocks(args['pixels'], args['BLOCK_R'] * grid[0]),)
        case 'pwconv2_grads_kernel':
            # The other loops, which share the depth, run less often.
            return (blocks(args['hidden'], args['BLOCK_M']), blocks(args['parts'], 8))
        case 'layer_norm_backward_kernel' | 'scaled_kernel':
            of_sample = blocks(args['pixels'], args['BLOCK_R'])
            return (blocks(args['samples'] * of_sample, grid[0]),)
    return ()


def instructions(cubin: bytes) -> list[tuple[int, str]]:
    """Addresses and texts."""
    text = cuobjdump(cubin, '-sass')
    lines = re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);', text, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    # What follows the last exit pads the kernel.
    last = max(i for i, (_, text) in enumerate(code) if operation(text) == 'EXIT')
    return code[: last + 1]


def operation(text: str) -> str:
    words = text.split()
    word = words[1] if words[0].startswith('@') else words[0]
    return word.partition('.')[0]


def executions(code: list[tuple[int, str]], trips: tuple[int, ...]) -> list[int]:
    """How often each instruction runs: a jump backwards ends a loop. Loops at one
    depth that the compiler made of one share its trips alike."""
    loops = []
    for address, text in code:
        target = re.search(r'0x([0-9a-f]+)', text)
        if operation(text) == 'BRA' and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    depths = {
        loop: sum(o[0] <= loop[0] and loop[1] <= o[1] for o in loops if o != loop)
        for loop in loops
    }
    result = []
    for address, _ in code:
        around = [loop for loop in loops if loop[0] <= address <= loop[1]]
        times = 1
        for loop in around:
            depth = depths[loop]
            times *= trips[depth] if depth < len(trips) else 1
        result.append(times)
    return result


if __name__ == '__main__':
    raise SystemExit(main())
