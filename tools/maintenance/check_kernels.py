#!/usr/bin/env python3
"""Checks the Triton kernels: numbers, and what they compile to.

Without ``--compile`` every kernel runs, forward and backward, against plain
PyTorch in the same dtype and in fp64, on a GPU, or with ``--smoke`` on a CPU in
Triton's interpreter. With ``--compile`` they are compiled for GPUs that this
machine need not have, and the registers, spilled bytes and shared memory of
each are listed.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ARCHITECTURES = (80, 90)
DTYPES = ('float32', 'bfloat16', 'float16')
# Channels of every named arch's stages, and V2's.
CHANNELS = (40, 96, 192, 384, 768, 1024, 1536, 2048, 2816, 3072)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('out', type=Path, help='folder for kernels.json')
    parser.add_argument(
        '--smoke',
        action='store_true',
        help='a few small shapes, on a CPU in the interpreter',
    )
    parser.add_argument(
        '--compile',
        action='store_true',
        help='compile for GPUs of compute capability 8.0 and 9.0 instead',
    )
    parser.add_argument(
        '--channels',
        type=int,
        nargs='+',
        default=CHANNELS,
        help='with --compile: channel counts',
    )
    parser.add_argument(
        '--dtypes', nargs='+', choices=DTYPES, default=DTYPES, help='with --compile'
    )
    parser.add_argument(
        '--first',
        action='store_true',
        help='with --compile: of what is measured at run time to choose from, only one',
    )
    args = parser.parse_args(argv)
    if args.smoke and args.compile:
        parser.error(
            '--smoke runs the kernels and --compile only compiles them: choose one'
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a kernel is wrong or spills, else 0."""
    args = parse_args(argv)
    # Triton reads it when the kernels are defined.
    os.environ['TRITON_INTERPRET'] = '1' if args.smoke else '0'
    import torch
    import triton

    if args.smoke:
        round_as_gpus_do()
    if not (args.smoke or args.compile or torch.cuda.is_available()):
        raise SystemExit(
            'error: there is no GPU: --smoke runs the kernels in '
            "Triton's interpreter, --compile only compiles them"
        )
    records = (
        compile_all(args.channels, args.dtypes, args.first)
        if args.compile
        else check_all(args.smoke)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    name = 'kernels_compiled.json' if args.compile else 'kernels.json'
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = dict(
        command=' '.join(['python', *sys.argv]),
        machine=dict(cpu=platform.processor(), gpu=gpu),
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            triton=triton.__version__,
        ),
        records=[],
    )
    for record in records:
        result['records'].append(record)
        # Now: whoever ends this early still has what was done.
        (args.out / name).write_text(json.dumps(result, indent=1) + '\n')
    records = result['records']
    print_table(records)
    bad = [r for r in records if not r['ok']]
    print(f'{len(records)} checks, {len(bad)} failed; {args.out / name}')
    return 1 if bad else 0


def print_table(records: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in records[0]:
        table.add_column(column)
    for record in records:
        table.add_row(
            *(f'{v:.2g}' if isinstance(v, float) else str(v) for v in record.values()),
            style=None if record['ok'] else 'red',
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


# Numbers ------------------------------------------------------------------


def round_as_gpus_do() -> None:
    """Triton's interpreter truncates to bf16 where a GPU rounds."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, from_dtype, to_dtype, mode)
        values = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = rounded


def check_all(smoke: bool) -> Iterator[dict]:
    """One record for each case of the whole block, the downsampling layer and
    the norm."""
    import torch

    from convnext_mm.ops.triton.choose import taking

    if smoke:
        shapes = [(2, 24, 5, 7)]
        dtypes = (torch.float32, torch.bfloat16)
        settings = [(7, 1, 1), (7, 2, 1)]
    else:
        shapes = [
            (1, 24, 33, 41),
            (2, 40, 64, 48),
            (2, 96, 50, 84),
            (3, 192, 25, 42),
            (2, 384, 25, 42),
            (1, 768, 13, 21),
            (2, 1024, 7, 11),
            (1, 2816, 7, 9),
            (1, 3072, 5, 6),
        ]
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        settings = [(7, 1, 1), (7, 2, 1)]
    # TF32 would hide errors, on both sides.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    others = [] if smoke else [(3, 1, 1), (11, 1, 2), (7, 1, 4)]
    turns = itertools.count()
    for shape, dtype in itertools.product(shapes, dtypes):
        # Each in its turn: one that is slow here may be fastest elsewhere.
        with taking(next(turns)):
            records = [
                check_block(shape, dtype, kernel, version, dilation)
                for kernel, version, dilation in settings + others
            ]
            records.append(check_layer('downsample', shape, dtype))
            records.append(check_layer('norm', shape, dtype))
        yield from records
        others = others if shape == shapes[0] else []


def check_block(shape, dtype, kernel: int, version: int, dilation: int) -> dict:
    import torch

    from convnext_mm.ops import eager
    from convnext_mm.ops.triton import operators
    from convnext_mm.ops.weights import BlockWeights

    n, c, _, _ = shape
    m = 4 * c
    randn = generator()
    # Magnitudes that keep every layer's output near 1.
    x = randn(*shape).contiguous(memory_format=torch.channels_last)
    weights = BlockWeights(
        dwconv_weight=randn(c, 1, kernel, kernel) / kernel,
        dwconv_bias=randn(c) / 10,
        norm_weight=1 + randn(c) / 10,
        norm_bias=randn(c) / 10,
        pwconv1_weight=randn(m, c) / c**0.5,
        pwconv1_bias=randn(m) / 10,
        pwconv2_weight=randn(c, m) / m**0.5,
        pwconv2_bias=randn(c) / 10,
        gamma=randn(c) if version == 1 else None,
        grn_gamma=randn(1, 1, 1, m) if version == 2 else None,
        grn_beta=randn(1, 1, 1, m) if version == 2 else None,
    )
    drop_scale = torch.full((n,), 1.25, device=x.device)
    drop_scale[n // 2 :] = 0

    def of_values(block):
        return lambda x, *weights: block(
            x, BlockWeights(*weights), drop_scale, dilation=dilation
        )

    return compare(
        f'block V{version} {kernel}x{kernel} d{dilation}',
        shape,
        dtype,
        of_values(eager.block),
        of_values(operators.block),
        (x, *weights),
    )


def check_layer(name: str, shape, dtype) -> dict:
    import torch

    from convnext_mm.ops import eager
    from convnext_mm.ops.triton import operators

    c = shape[1]
    randn = generator()
    values = [
        randn(*shape).contiguous(memory_format=torch.channels_last),
        1 + randn(c) / 10,
        randn(c) / 10,
    ]
    settings = dict(eps=1e-6)
    if name == 'downsample':
        values += [randn(2 * c, c, 2, 2) / (2 * c**0.5), randn(2 * c) / 10]
    else:
        settings['channels_last'] = False
    return compare(
        name,
        shape,
        dtype,
        functools.partial(getattr(eager, name), **settings),
        functools.partial(getattr(operators, name), **settings),
        values,
    )


def generator():
    """A seeded ``randn`` that gives the device's tensors."""
    import torch

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    source = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=source).to(device)


def compare(name: str, shape, dtype, plain, fused, values) -> dict:
    """Errors against fp64 of output and gradients. Allowed is the project's
    contract: in fp32 1e-5 and 1e-4 of the largest value; in 16 bit 1.5 times
    the plain one's error, root mean square, of which a few extreme roundings
    say nothing."""
    import torch

    def run(function, dtype):
        inputs = [
            None if v is None else v.detach().to(dtype).requires_grad_() for v in values
        ]
        out = function(*inputs)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator).to(out)
        wanted = [v for v in inputs if v is not None]
        return [out, *torch.autograd.grad(out, wanted, grad)]

    exact = run(plain, torch.float64)

    def size(x):
        return x.abs().max() if dtype == torch.float32 else x.norm()

    def errors(results):
        return [(size(r.double() - e) / size(e)).item() for r, e in zip(results, exact)]

    plain_errors, fused_errors = (errors(run(f, dtype)) for f in (plain, fused))
    if dtype == torch.float32:
        allowed = [1e-5] + [1e-4] * (len(exact) - 1)
    else:
        # One rounding is allowed where plain has none.
        unit = torch.finfo(dtype).eps / 2
        allowed = [1.5 * max(e, unit) for e in plain_errors]
    share = max(f / a for f, a in zip(fused_errors, allowed))
    return dict(
        check=name,
        shape='x'.join(map(str, shape)),
        dtype=str(dtype).split('.')[1],
        output_error=fused_errors[0],
        plain_output_error=plain_errors[0],
        grad_error=max(fused_errors[1:]),
        plain_grad_error=max(plain_errors[1:]),
        share_of_allowed=share,
        ok=share <= 1,
    )


# Compilation --------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: compiles what would be started."""

    def __init__(self, kernel, results: list) -> None:
        self.kernel = kernel
        self.results = results

    def __getitem__(self, grid):

        def start(*args, **kwargs) -> None:
            compiled = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.results.append((self.kernel.__name__, compiled))

        return start


class AbsentDevice:
    """What Triton asks its driver when it compiles but does not run."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(channels: list[int], dtypes: list[str], first: bool) -> Iterator[dict]:
    """One record for each kernel that a block, a downsampling layer and a norm
    of each dtype start, every candidate of the tuner included."""
    import torch
    import triton

    from convnext_mm.ops.triton import kernels, launch

    results = []
    for name in dir(kernels):
        kernel = getattr(kernels, name)
        if name.endswith('_kernel'):
            setattr(kernels, name, Recorder(kernel, results))
    launch.programs_at_once = lambda: 528

    def all_candidates(key, rows, candidates, run):
        if not first:
            for candidate in candidates:
                run(candidate)
        # Of products the first kernel, not PyTorch's.
        return next((c for c in candidates if c is not None), None)

    launch.fastest = all_candidates
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(AbsentDevice(architecture))
        for c, dtype in itertools.product(channels, dtypes):
            results.clear()
            start_all(c, getattr(torch, dtype))
            seen = set()
            for name, compiled in results:
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                usage = resource_usage(compiled.asm['cubin'])
                yield dict(
                    kernel=name,
                    sm=architecture,
                    channels=c,
                    dtype=dtype,
                    warps=compiled.metadata.num_warps,
                    registers=usage['REG'],
                    spilled=usage['STACK'] + usage['LOCAL'],
                    shared=compiled.metadata.shared,
                    ok=usage['STACK'] + usage['LOCAL'] == 0,
                )


def zero_weights(c: int, **settings):
    """Of a block of C channels, with layer scale."""
    import torch

    from convnext_mm.ops.weights import BlockWeights

    m = 4 * c
    shapes = dict(
        dwconv_weight=(c, 1, 7, 7),
        dwconv_bias=(c,),
        norm_weight=(c,),
        norm_bias=(c,),
        pwconv1_weight=(m, c),
        pwconv1_bias=(m,),
        pwconv2_weight=(c, m),
        pwconv2_bias=(c,),
        gamma=(c,),
    )
    return BlockWeights(
        **{name: torch.zeros(shape, **settings) for name, shape in shapes.items()}
    )


def start_all(c: int, dtype) -> None:
    """Every launch of both directions, in the variants that a model has: the
    input in the same dtype, or in fp32 as under autocast."""
    import torch

    from convnext_mm.ops import fused
    from convnext_mm.ops.triton import operators
    from convnext_mm.ops.weights import BlockNeeds

    n, height, width, m = 1, 2, 4, 4 * c
    zeros = torch.zeros
    with_gamma = zero_weights(c)
    grn = dict(grn_gamma=zeros(1, 1, 1, m), grn_beta=zeros(1, 1, 1, m))
    all_needed = BlockNeeds(*[True] * len(BlockNeeds._fields))
    settings = (torch.ones(n), 1e-6, 1)  # drop scale, eps, dilation
    for weights in (with_gamma, with_gamma._replace(gamma=None, **grn)):
        for x_dtype in {dtype, torch.float32}:
            x = zeros(n, c, height, width, dtype=x_dtype).contiguous(
                memory_format=torch.channels_last
            )
            for keep in (fused.KEEP_NOTHING, fused.KEEP_ALL):
                out, cast, maps, hidden = operators._forward(
                    x, weights, *settings, dtype, keep
                )
            kept = (x if cast is None else cast, maps, hidden)
            operators._backward(out, *kept, weights, *settings, x_dtype, all_needed)
            norm = (weights.norm_weight, weights.norm_bias, 1e-6)
            grad = operators._norm_op(x, *norm, False, torch.float32)
            operators._norm_backward_op(grad, x, *norm)


def cuobjdump(cubin: bytes, option: str) -> str:
    """What NVIDIA's program, which comes with Triton, prints of a binary."""
    import triton

    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, option, file.name], check=True, capture_output=True, text=True
        ).stdout


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread (REG), bytes of its stack, where spills go, and
    bytes of local memory, as cuobjdump reads them from the binary."""
    text = cuobjdump(cubin, '--dump-resource-usage')
    line = next(line for line in text.splitlines() if 'REG:' in line)
    pairs = (word.split(':') for word in line.split() if word.count(':') == 1)
    return {key: int(value) for key, value in pairs if value.isdigit()}


if __name__ == '__main__':
    sys.exit(main())
