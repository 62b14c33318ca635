#!/usr/bin/env python3
"""Times what a ConvNeXt block costs the host, without a GPU: Python, PyTorch's
dispatcher and Triton's launcher, of forward and backward, beside mmpretrain's block.

Maps have one pixel, on a CPU. Kernels are compiled, for a GPU that is not there, and
all that a launch does is done but the call of the driver. PyTorch's operators run on
the CPU and compute next to nothing; what they cost a host beside a GPU is
not the same, but near it. So compare the two networks, not microseconds with a GPU's.
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from pathlib import Path

from check_kernels import AbsentDevice


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out', type=Path, help='json file to write')
    parser.add_argument('--channels', type=int, default=8)
    parser.add_argument('--blocks', type=int, default=18, help='in a row, as in tiny')
    parser.add_argument('--rounds', type=int, default=30)
    return parser.parse_args(argv)


def without_a_gpu() -> None:
    """Makes the kernels start on CPU tensors, and launches do nothing."""
    import torch
    import triton

    from convnext_mm.ops import triton as ours
    from convnext_mm.ops.triton import choose, launch

    triton.runtime.driver.set_active(AbsentDevice(90))

    def load_nothing(self) -> None:
        self._run = lambda *args: None
        self.module = self.function = object()

    triton.compiler.CompiledKernel._init_handles = load_nothing
    ours._device_reason = lambda device: None
    # Few: their parts are summed on the CPU.
    launch.programs_at_once = lambda: 4
    choose._time = lambda run, candidate: float(candidate is None)
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False


def networks(channels: int, blocks: int) -> dict:
    import torch
    from mmpretrain.models.backbones.convnext import ConvNeXtBlock

    from convnext_mm.models.block import Block

    result = dict(
        ours=torch.nn.Sequential(
            *(Block(channels, impl='triton', drop_path=0.1) for _ in range(blocks))
        ),
        mmpretrain=torch.nn.Sequential(
            *(ConvNeXtBlock(channels, drop_path_rate=0.1) for _ in range(blocks))
        ),
    )
    for block in result['mmpretrain']:
        # A depthwise one in bf16 is a loop over channels on some CPUs.
        block.depthwise_conv = torch.nn.Conv2d(channels, channels, 7, padding=3)
    return result


def step(network, x) -> tuple[float, float]:
    """Seconds of forward and of backward, under bf16 autocast."""
    import torch

    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16):
        out = network(x)
    middle = time.perf_counter()
    out.backward(out)
    end = time.perf_counter()
    network.zero_grad()
    return middle - start, end - middle


def dispatches(network, x) -> dict[str, int]:
    """Operators that PyTorch dispatches in a step, by name."""
    import torch

    with torch.profiler.profile() as profile:
        step(network, x)
    names = Counter(
        event.name for event in profile.events() if event.name.startswith('aten::')
    )
    return dict(names.most_common())


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ['TRITON_INTERPRET'] = '0'
    import torch
    import triton

    without_a_gpu()
    torch.set_num_threads(1)
    x = torch.rand(2, args.channels, 1, 1).requires_grad_()
    both = networks(args.channels, args.blocks)
    for network in both.values():
        for _ in range(3):
            step(network, x)
    times = {name: [] for name in both}
    for _ in range(args.rounds):
        for name, network in both.items():
            times[name].append(step(network, x))
    records = []
    for name, network in both.items():
        forward, backward = (
            statistics.median(t) * 1e6 / args.blocks for t in zip(*times[name])
        )
        counts = dispatches(network, x)
        records.append(
            dict(
                network=name,
                forward_us=round(forward, 1),
                backward_us=round(backward, 1),
                dispatches=round(sum(counts.values()) / args.blocks, 1),
                operators={k: round(v / args.blocks, 2) for k, v in counts.items()},
            )
        )
        print({k: v for k, v in records[-1].items() if k != 'operators'})
    args.out.write_text(
        json.dumps(
            dict(
                command=f'python tools/maintenance/host_time.py {args.out}',
                versions=dict(torch=torch.__version__, triton=triton.__version__),
                records=records,
            ),
            indent=1,
        )
        + '\n'
    )
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
