"""Writes what share of the time of ConvNeXt-T on a CPU each operator has, in
one thread: inference wholly in bf16 after ``switch_to_deploy()`` (1 x 3 x 512 x
512), and a train step under bf16 autocast (2 x 3 x 256 x 256)."""

import argparse
import csv

import torch
from torch.profiler import ProfilerActivity, profile

from convnext_mm import ConvNeXt

LARGEST = 12


def inference():
    model = ConvNeXt('tiny', impl='lean').switch_to_deploy().bfloat16()
    x = torch.rand(1, 3, 512, 512).bfloat16()
    return torch.no_grad()(lambda: model(x))


def train_step():
    model = ConvNeXt('tiny', impl='lean')
    x = torch.rand(2, 3, 256, 256)

    def step() -> None:
        with torch.autocast('cpu', torch.bfloat16):
            outs = model(x)
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])

    return step


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', metavar='FILE.csv')
    parser.add_argument('--steps', type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with open(args.out, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['mode', 'operator', 'share of time', 'calls'])
        for mode, make in (('inference', inference), ('train', train_step)):
            run = make()
            run()
            run()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(args.steps):
                    run()
            costs = sorted(
                profiler.key_averages(), key=lambda e: -e.self_cpu_time_total
            )
            total = sum(e.self_cpu_time_total for e in costs)
            writer.writerows(
                [mode, e.key, f'{e.self_cpu_time_total / total:.4f}', e.count]
                for e in costs[:LARGEST]
            )


if __name__ == '__main__':
    main()
