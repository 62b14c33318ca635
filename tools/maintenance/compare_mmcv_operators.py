"""Compares mmcv's operators on torchvision with its compiled ones over random cases.

    python tools/maintenance/compare_mmcv_operators.py --cases 500 \\
        --out benchmarks/mmcv_operators.json --record tests/data/mmcv_operators.npz

needs an mmcv whose compiled operators import (``make setup MMCV=compiled``).
``--record`` writes what the compiled operators give for the first few cases, for
machines that have none. Inputs are drawn by NumPy's RandomState, whose numbers do
not change between versions.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mmcv.ops
import numpy as np
import torch
from mmdet.models.layers import multiclass_nms
from numpy.random import RandomState
from rich.progress import track
from torch import Tensor

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.compat.mmcv_ops import in_use, operators

RECORDED = 4
# Modules of mmcv.ops that call the extension. The package has functions of the
# same names.
CALLERS = (
    'nms',
    'roi_align',
    'roi_pool',
    'focal_loss',
    'deform_conv',
    'modulated_deform_conv',
    'multi_scale_deform_attn',
)
Results = dict[str, Tensor]


@contextlib.contextmanager
def calling(extension: Any) -> Iterator[None]:
    """mmcv.ops calls another extension within the block."""
    modules = [sys.modules[f'mmcv.ops.{name}'] for name in CALLERS]
    before = [module.ext_module for module in modules]
    for module in modules:
        module.ext_module = extension
    try:
        yield
    finally:
        for module, extension in zip(modules, before):
            module.ext_module = extension


def draw(rng: RandomState, *shape: int, spread: float = 1) -> Tensor:
    return torch.from_numpy(rng.randn(*shape).astype(np.float32) * spread)


def draw_boxes(rng: RandomState, number: int) -> Tensor:
    """(number, 4) in an image of 100 pixels; of one case in three on a grid, which
    gives equal boxes, boxes without area, and IoUs that equal a threshold."""
    corners = rng.rand(number, 2, 2) * 100
    if rng.randint(3) == 0:
        corners = (corners / 20).round() * 20
    low, high = corners.min(1), corners.max(1)
    return torch.from_numpy(np.hstack([low, high]).astype(np.float32))


def draw_scores(rng: RandomState, number: int) -> Tensor:
    scores = rng.rand(number)
    if rng.randint(3) == 0:  # with equal ones
        scores = scores.round(1)
    return torch.from_numpy(scores.astype(np.float32))


def split(dets: Tensor, indices: Tensor) -> Results:
    return dict(boxes=dets[:, :4], scores=dets[:, 4], indices=indices)


def case_nms(rng: RandomState) -> Results:
    number = rng.randint(300)
    dets, kept = mmcv.ops.nms(
        draw_boxes(rng, number),
        draw_scores(rng, number),
        iou_threshold=rng.choice([0.3, 0.5, 0.6, 0.7]),
        offset=rng.randint(2),
        score_threshold=rng.choice([0, 0.3]),
        max_num=rng.choice([-1, 20]),
    )
    return split(dets, kept)


def case_batched_nms(rng: RandomState) -> Results:
    number = rng.randint(1, 300)
    dets, kept = mmcv.ops.batched_nms(
        draw_boxes(rng, number),
        draw_scores(rng, number),
        torch.from_numpy(rng.randint(5, size=number)),
        dict(
            type=rng.choice(['nms', 'soft_nms']),
            iou_threshold=0.5,
            split_thr=rng.choice([50, 10000]),
        ),
        class_agnostic=bool(rng.randint(2)),
    )
    return split(dets, kept)


def case_multiclass_nms(rng: RandomState) -> Results:
    number, classes = rng.randint(1, 100), 4
    boxes = torch.stack([draw_boxes(rng, number) for _ in range(classes)], dim=1)
    dets, labels = multiclass_nms(
        boxes.flatten(1) if rng.randint(2) else boxes[:, 0],
        draw_scores(rng, number * (classes + 1)).view(number, classes + 1),
        score_thr=0.2,
        nms_cfg=dict(type='nms', iou_threshold=0.5),
        max_num=50,
    )
    return split(dets, labels)


def case_soft_nms(rng: RandomState) -> Results:
    number = rng.randint(120)
    boxes = draw_boxes(rng, number)
    boxes[:, 2:] += 1  # mmcv divides 0 by 0 for two boxes without area
    dets, kept = mmcv.ops.soft_nms(
        boxes,
        draw_scores(rng, number),
        iou_threshold=rng.choice([0.3, 0.5]),
        sigma=0.5,
        min_score=rng.choice([0.001, 0.1]),
        method=rng.choice(['naive', 'linear', 'gaussian']),
        offset=rng.randint(2),
    )
    return split(dets, kept)


def case_nms_match(rng: RandomState) -> Results:
    number = rng.randint(120)
    boxes = torch.hstack([draw_boxes(rng, number), draw_scores(rng, number)[:, None]])
    groups = mmcv.ops.nms_match(boxes, rng.choice([0.3, 0.5, 0.6]))
    return dict(
        members=torch.cat([torch.tensor([], dtype=torch.long), *groups]),
        sizes=torch.tensor([len(group) for group in groups]),
    )


def case_roi_align(rng: RandomState) -> Results:
    # Boxes of any size and beyond the edges, and now and then none.
    number = rng.randint(10)
    maps = draw(rng, 2, 3, *rng.randint(4, 20, size=2)).requires_grad_()
    boxes = draw_boxes(rng, number) + draw(rng, number, 1, spread=30)
    pooled = mmcv.ops.roi_align(
        maps,
        torch.hstack([torch.from_numpy(rng.randint(2, size=(number, 1))), boxes]),
        tuple(int(size) for size in rng.randint(1, 8, size=2)),
        rng.choice([0.25, 0.125, 1]),
        int(rng.randint(3)),
        'avg',
        bool(rng.randint(2)),
    )
    pooled.backward(draw(rng, *pooled.shape))
    return dict(pooled=pooled.detach(), gradient=maps.grad)


def case_deform_conv(rng: RandomState) -> Results:
    return deformable(rng, modulated=False)


def case_modulated_deform_conv(rng: RandomState) -> Results:
    return deformable(rng, modulated=True)


def deformable(rng: RandomState, modulated: bool) -> Results:
    groups, deform_groups = (int(2 ** rng.randint(2)) for _ in range(2))
    kernel = rng.randint(1, 4, size=2).tolist()
    stride, padding, dilation = (
        rng.randint(low, 3, size=2).tolist() for low in (1, 0, 1)
    )
    image = draw(rng, 2, 4, *rng.randint(8, 14, size=2))
    size = [
        (image.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    inputs = dict(image=image, offset=draw(rng, 2, 2 * points, *size, spread=2))
    if modulated:
        inputs['mask'] = draw(rng, 2, points, *size).sigmoid()
    inputs['weight'] = draw(rng, 6, 4 // groups, *kernel)
    if modulated:
        inputs['bias'] = draw(rng, 6)
    for tensor in inputs.values():
        tensor.requires_grad_()
    operator = mmcv.ops.modulated_deform_conv2d if modulated else mmcv.ops.deform_conv2d
    output = operator(
        *inputs.values(), stride, padding, dilation, groups, deform_groups
    )
    output.backward(draw(rng, *output.shape))
    gradients = {f'gradient of {n}': tensor.grad for n, tensor in inputs.items()}
    return dict(output=output.detach(), **gradients)


CASES: dict[str, Callable[[RandomState], Results]] = {
    name.removeprefix('case_'): function
    for name, function in list(globals().items())
    if name.startswith('case_')
}


def difference(expected: Results, found: Results) -> float:
    """The largest difference, of the largest value where that is above 1; infinity
    where shapes or whole numbers differ."""
    worst = 0.0
    for name, value in expected.items():
        other = found[name]
        if value.shape != other.shape:
            return float('inf')
        if not value.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(value, other) else float('inf'))
        elif not torch.equal(value.isnan(), other.isnan()):
            return float('inf')
        elif value.numel():
            value, other = value.nan_to_num(), other.nan_to_num()
            scale = max(1.0, float(value.abs().max()))
            worst = max(worst, float((value - other).abs().max()) / scale)
    return worst


def run(name: str, seed: int, extension: Any = operators) -> Results:
    with calling(extension):
        return CASES[name](RandomState(seed))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--cases', type=int, default=500, help='of each operator')
    parser.add_argument('--out', type=Path, help='JSON with the differences')
    parser.add_argument('--record', type=Path, help='.npz with compiled results')
    args = parser.parse_args()
    if in_use():
        print(
            'this mmcv has no compiled operators to compare with: '
            '`make setup MMCV=compiled` makes them.',
            file=sys.stderr,
        )
        return 1
    compiled = sys.modules['mmcv._ext']
    rows, recorded = {}, {}
    for name in CASES:
        differences = []
        for seed in track(range(args.cases), description=f'{name:22}'):
            expected = run(name, seed, compiled)
            differences.append(difference(expected, run(name, seed)))
            if seed < RECORDED:
                for part, value in expected.items():
                    recorded[f'{name}/{seed}/{part}'] = value.numpy()
        rows[name] = dict(
            cases=args.cases,
            equal=sum(d == 0 for d in differences),
            largest_difference=max(differences),
        )
        print(name, rows[name])
    if args.out:
        report = dict(
            command=' '.join(['python', *sys.argv]),
            machine=machine(),
            versions=versions(),
            operators=rows,
        )
        args.out.write_text(json.dumps(report, indent=1) + '\n')
    if args.record:
        np.savez_compressed(args.record, **recorded)
    return 0


if __name__ == '__main__':
    sys.exit(main())
