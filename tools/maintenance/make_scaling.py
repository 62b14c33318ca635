"""Writes docs/scaling.md: memory and traffic of every arch and every recipe on 8, 64
and 512 GPUs; with --check only says whether the page is current (status 1 if not).
--measure first counts anew what backbones keep for backward, on this CPU."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from convnext_mm import ConvNeXt
from convnext_mm.analysis.complexity import build_model
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.analysis.scaling import Cost, replicated, sharded
from convnext_mm.archs import ARCHS
from convnext_mm.engine.sharding import parameters_of_units

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'scaling.md'
MEASURED = ROOT / 'benchmarks' / 'saved_bytes.json'
FOLDERS = ('mask_rcnn', 'cascade', 'upernet', 'imagenet')
COUNTS = (8, 64, 512)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
SIZES = (64, 128)  # of images: two, for what grows with them
PAGE_START = """\
# Scaling

Made by `python tools/maintenance/make_scaling.py`; change that, not this page.
Gigabytes are 10^9 bytes.

With `model_wrapper_cfg = dict(type='convnext_mm.FullyShard')` in its config a run
of several processes keeps weights, gradients and optimizer state in shards
(PyTorch's FSDP2): [configs/sharded](../configs/sharded) does so with xlarge, xxlarge
and huge. Everything else stays: `tools/dist_train.sh`, layer decay, clipping,
gradient accumulation, mixed precision, and checkpoints, from which a run may go on
with shards, without them, or in one process. Tests take the whole model.
MMEngine's `FSDPStrategy`, `MMFullyShardedDataParallel` and
`ZeroRedundancyOptimizer` are refused, and with shards `EMAHook`.

## Checked, and only computed

No GPU was used. `tests/engine/test_sharding.py` compares two processes on a CPU,
with gloo, on a small ConvNeXt:

- losses, norms of gradients and weights over 20 steps (V1 in fp32, V2 in bf16 mixed
  precision): those with shards are those of `DistributedDataParallel` (DDP) within
  1e-5;
- bytes that a process gives to collectives in a step, and bytes of weights,
  gradients and optimizer state that it holds (V2 in fp32): those of the formulas
  below, exactly, with shards and with DDP.

Memory kept for backward is counted by hooks on a CPU, at two sizes of images
(`benchmarks/saved_bytes.json`). All else is computed: other numbers of processes,
what is gathered at the peak, and the bytes that a ring sends. Times are not
predicted.

## Assumptions

- Weights, gradients and AdamW's two states in fp32, 4 bytes each, also under mixed
  precision, which casts weights where they are used; no averaged copy of the model.
- DDP holds its gradients twice: beside the parameters, and in buckets that it sends.
- Collectives go around a ring: of P bytes that n processes gather, or of which each
  gets a reduced part, each sends P (n - 1) / n; an all-reduce is both. DDP: one
  all-reduce of all gradients. Shards: weights of blocks and downsampling layers are
  gathered twice, for the forward and the backward pass, others once; all gradients
  are reduced once.
- A weight is cut along its first dimension (GRN's along its last), and shards are
  padded to the largest.
- *Gathered*, at the peak: weights and gradients outside of blocks and downsampling
  layers, and twice those of the largest block or layer: one runs while the next is
  on its way, gradients have a copy to be sent.
- *For backward*: what the backbone keeps with `impl='lean'`, and the Triton kernels
  too; at the crop of the recipe (detectors: 800 x 1344, the largest). Necks, heads
  and losses add to it, with shards as without.
- Not counted: CUDA's context, NCCL's buffers, workspaces, fragments.
"""


def measure() -> dict[str, dict[str, float]]:
    """Arch, V1 and V2, to bytes that it keeps for a pixel, by dtype."""
    torch.set_num_threads(1)
    found = {}
    for arch in ARCHS:
        for version in ('V1', 'V2'):
            with torch.device('meta'):
                model = ConvNeXt(arch, use_grn=version == 'V2', impl='lean')
            # Values do not matter: zeros that take no memory.
            model = model.to_empty(device='cpu')
            found[f'{arch} {version}'] = {
                name: (_kept(model, SIZES[1], dtype) - _kept(model, SIZES[0], dtype))
                / (SIZES[1] ** 2 - SIZES[0] ** 2)
                for name, dtype in DTYPES.items()
            }
    return found


def _kept(model: nn.Module, size: int, dtype: torch.dtype) -> int:
    image = torch.zeros(1, 3, size, size)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
        return saved_bytes(lambda: model(image), model)


def train_shape(cfg: Config) -> tuple[int, int]:
    """(H, W) of a recipe's largest training image."""
    if cfg.default_scope == 'mmseg':
        return tuple(cfg.model.data_preprocessor.size)
    if cfg.default_scope == 'mmpretrain':
        pipeline = cfg.train_dataloader.dataset.pipeline
        (size,) = [s.scale for s in pipeline if s.type == 'RandomResizedCrop']
        return size, size
    return (1024, 1024) if '-lsj-' in cfg.filename else (800, 1344)


def gigabytes(value: float) -> str:
    return f'{value / 1e9:.3g}'


def costs(model: nn.Module) -> list[str]:
    """The cells below HEADS."""
    ddp = [replicated(model.parameters(), count) for count in COUNTS]
    units = parameters_of_units(model)
    fsdp = [sharded(units, count) for count in COUNTS]

    def cell(of: list[Cost], number: Callable[[Cost], int]) -> str:
        return ' / '.join(gigabytes(number(cost)) for cost in of)

    return [
        f'{sum(p.numel() for p in model.parameters()) / 1e6:.1f}',
        cell(ddp[:1], lambda cost: cost.held),
        cell(fsdp, lambda cost: cost.held),
        cell(fsdp[:1], lambda cost: cost.gathered),
        cell(ddp, lambda cost: cost.sent),
        cell(fsdp, lambda cost: cost.sent),
    ]


HEADS = [
    'parameters, M',
    'held, DDP',
    'held, shards',
    'gathered',
    'sent, DDP',
    'sent, shards',
]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def make_page() -> str:
    kept = json.loads(MEASURED.read_text())['bytes_for_a_pixel']
    archs = []
    for arch in ARCHS:
        version = 'V2' if arch == 'huge' else 'V1'
        with torch.device('meta'):
            model = ConvNeXt(arch, use_grn=version == 'V2')
        pixels = 512 * 512
        archs.append(
            [
                f'{arch} {version}',
                *costs(model),
                *(gigabytes(kept[f'{arch} {version}'][d] * pixels) for d in DTYPES),
            ]
        )
    recipes = []
    for folder in FOLDERS:
        for path in sorted((ROOT / 'configs' / folder).glob('*.py')):
            cfg = Config.fromfile(path)
            backbone, batch = cfg.model.backbone, cfg.train_dataloader.batch_size
            version = 'V2' if backbone.get('use_grn') else 'V1'
            dtype = 'bf16' if 'Amp' in cfg.optim_wrapper.type else 'fp32'
            height, width = train_shape(cfg)
            for_pixel = kept[f'{backbone.arch} {version}'][dtype]
            recipes.append(
                [
                    f'[{path.stem}](../configs/{folder}/{path.name})',
                    *costs(build_model(cfg)),
                    f'{gigabytes(for_pixel * height * width * batch)} '
                    f'({batch} x {height} x {width}, {dtype})',
                ]
            )
    several = ', '.join(map(str, COUNTS[:-1])) + f' and {COUNTS[-1]}'
    return '\n'.join(
        [
            PAGE_START,
            '## Backbones\n',
            f'Gigabytes in each process, on {several} GPUs where there are three '
            f'numbers, else on {COUNTS[0]} (DDP holds the same on any number). Held: '
            'always; sent: in a step; for backward: of one image of 512 x 512.\n',
            table(['arch', *HEADS, 'for backward, fp32', 'for backward, bf16'], archs),
            '## Recipes\n',
            "As above, of the whole model; for backward: of the recipe's batch.\n",
            table(['recipe', *HEADS, 'for backward'], recipes),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    parser.add_argument('--measure', action='store_true', help='minutes on a CPU')
    args = parser.parse_args(argv)
    if args.measure:
        result = dict(
            command='python tools/maintenance/make_scaling.py --measure',
            torch=torch.__version__,
            impl='lean',
            image_sizes=SIZES,
            bytes_for_a_pixel=measure(),
        )
        MEASURED.write_text(json.dumps(result, indent=1) + '\n')
    page = make_page()
    if args.check:
        current = PAGE.is_file() and PAGE.read_text() == page
        if not current:
            print(
                f'{PAGE.relative_to(ROOT)} is not current: run python '
                'tools/maintenance/make_scaling.py'
            )
        return 0 if current else 1
    PAGE.write_text(page)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
