"""Exports models, compares each file with its model, times it beside PyTorch, and
measures what fp16 and int8 cost the demos' models. Writes every row as it is measured,
goes on from there when started again, and writes the tables of docs/export.md.

    make demo demo-seg
    python tools/maintenance/measure_export.py

The other models have random weights: their accuracy is none of its business.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
from mmengine.registry import MODELS, DefaultScope
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.apis.config import load_config
from convnext_mm.apis.export import export
from convnext_mm.apis.export.targets import TARGETS
from convnext_mm.apis.quiet import quiet
from convnext_mm.checkpoint.write import write_text
from make_benchmark_tables import fill, markdown

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'examples'))
import run_onnx  # noqa: E402, what users copy is what is measured

OUT = ROOT / 'benchmarks/export_cpu.json'
PAGE = ROOT / 'docs/export.md'
MARKS = ('<!-- tools/maintenance/measure_export.py: {} -->', '<!-- end -->')
SHAPES = ROOT / 'data/shapes'
MASK_RCNN = 'mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco'
CASCADE = 'cascade-mask-rcnn_convnext-t_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco'
V2 = 'mask-rcnn_convnext-v2-t-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco'
UPERNET = 'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512'
DEMOS = dict(
    detector=('work_dirs/demo', 'Mask R-CNN-atto of `make demo`'),
    segmentor=('work_dirs/demo-seg', 'UPerNet-atto of `make demo-seg`'),
)
# Name of a row to config and part.
MODELS_OF = {
    'ConvNeXt-T': (MASK_RCNN, 'backbone'),
    'ConvNeXt V2-T': (V2, 'backbone'),
    'UPerNet, ConvNeXt-T': (UPERNET, 'model'),
    'Mask R-CNN, ConvNeXt-T': (MASK_RCNN, 'model'),
    'Cascade Mask R-CNN, ConvNeXt-T': (CASCADE, 'model'),
    'RetinaNet, ConvNeXt-T': ('retinanet_convnext-t_fpn_1x_coco', 'model'),
}
EVERY_TARGET = ('ConvNeXt-T', *(name for _, name in DEMOS.values()))


def random_model(config: str, part: str) -> nn.Module:
    """Of random weights, that finds something."""
    cfg = load_config(config, cfg_options={'model.backbone.init_cfg': None})
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), quiet():
        model = MODELS.build(cfg.model.backbone if part == 'backbone' else cfg.model)
        model.init_weights()
    with torch.no_grad():
        for name, param in model.named_parameters():
            # GRN begins as the identity, and classes begin alike.
            if 'grn' in name or ('cls' in name and param.dim() > 1):
                fan_in = param[0].numel()
                # As much in a 3 x 3 convolution would make all scores 1.
                std = 0.1 if fan_in <= 1024 else (2 / fan_in) ** 0.5
                param += std * torch.randn_like(param)
    return model.eval()


def rows() -> Iterator[tuple[str, str, str]]:
    """Model, target, dtype."""
    for name in (*EVERY_TARGET, *(n for n in MODELS_OF if n not in EVERY_TARGET)):
        targets = TARGETS if name in EVERY_TARGET else ('onnx',)
        for to in targets:
            yield name, to, 'fp32'
        yield name, 'onnx', 'fp16'
        if name not in MODELS_OF:
            yield name, 'onnx', 'int8'


def measure(name: str, to: str, dtype: str, folder: Path) -> dict:
    """A row of the result."""
    path = folder / f'model{TARGETS[to]}'
    demo = next((d for d in DEMOS.values() if d[1] == name), None)
    int8 = str(SHAPES / 'images/training') if dtype == 'int8' else None
    result = export(
        str(ROOT / demo[0]) if demo else random_model(*MODELS_OF[name]),
        to,
        path,
        dtype='fp32' if int8 else dtype,
        int8=int8,
    )
    row = dict(
        model=name,
        to=to,
        dtype=dtype,
        megabytes=result.bytes / 1e6,
        operators=dict(result.operators.most_common()),
        differences=result.differences,
        time=result.time,
    )
    if demo and to == 'onnx':
        row['accuracy'] = accuracy(path)
    return row


def accuracy(path: Path) -> dict[str, float]:
    """Of an ONNX file on the demos' held-out pictures, run as examples/run_onnx.py
    runs it: box and mask AP and AP50 by pycocotools, or mIoU."""
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    facts = run_onnx.facts_of(session)
    if facts['task'] == 'detection':
        return _average_precision(session, facts)
    return dict(mIoU=_mean_iou(session, facts))


def _average_precision(session, facts: dict) -> dict[str, float]:
    with quiet():
        truth = COCO(SHAPES / 'annotations/instances_validation.json')
    found = []
    for index, picture in truth.imgs.items():
        image = cv2.imread(str(SHAPES / 'images/validation' / picture['file_name']))
        for name, score, box, mask in run_onnx.detect(session, facts, image, 0.0):
            x1, y1, x2, y2 = map(float, box)
            found.append(
                dict(
                    image_id=index,
                    category_id=facts['classes'].index(name) + 1,
                    score=score,
                    bbox=[x1, y1, x2 - x1, y2 - y1],
                    segmentation=coco_mask.encode(
                        np.asfortranarray(mask.astype(np.uint8))
                    ),
                )
            )
    metrics = {}
    with quiet():
        for kind in ('bbox', 'segm'):
            results = truth.loadRes([dict(each) for each in found])
            evaluation = COCOeval(truth, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            metrics[f'{kind} AP'], metrics[f'{kind} AP50'] = evaluation.stats[:2]
    return {name: float(value) for name, value in metrics.items()}


def _mean_iou(session, facts: dict) -> float:
    classes = len(facts['classes'])
    confusion = np.zeros((classes, classes), np.int64)
    for file in sorted((SHAPES / 'images/validation').glob('*.png')):
        truth = cv2.imread(str(SHAPES / 'annotations/validation' / file.name), 0)
        found = run_onnx.segment(session, facts, cv2.imread(str(file)))
        known = truth < classes
        pairs = truth[known].astype(np.int64) * classes + found[known]
        confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    both = confusion.diagonal()
    return float((both / (confusion.sum(0) + confusion.sum(1) - both)).mean())


def exported_table(content: dict) -> str:
    head = "model, target, dtype, MB, largest difference, of PyTorch's time".split(', ')
    table = [head]
    for row in content['rows']:
        table.append(
            [
                *(row[key] for key in ('model', 'to', 'dtype')),
                f'{row["megabytes"]:.1f}',
                difference(row['differences']),
                f'{row["time"]:.2f}',
            ]
        )
    return markdown(table)


def difference(found: dict[str, float]) -> str:
    if 'largest' in found:
        text = f'{found["largest"]:.0e} of the largest value'
        if 'classes' in found:
            text += f'; {found["classes"]:.2%} of pixels'
        return text
    count, lost = int(found['objects']), int(found['unmatched'])
    text = f'{count - lost} of {count} objects'
    if 'boxes' in found:
        text += f'; {found["boxes"]:.0e} px, score {found["scores"]:.0e}'
    return text


def accuracy_table(content: dict) -> str:
    table = []
    for row in content['rows']:
        if 'accuracy' in row:
            values = [f'{k} {v:.3f}' for k, v in row['accuracy'].items()]
            table.append([row['model'], row['dtype'], ', '.join(values)])
    return markdown([['model', 'dtype', 'held-out pictures'], *table])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tables', action='store_true', help='only write the tables')
    args = parser.parse_args()
    content = json.loads(OUT.read_text()) if OUT.exists() else dict(rows=[])
    if not args.tables:
        for folder, _ in DEMOS.values():
            if not (ROOT / folder).is_dir():
                parser.error(f'{folder} is missing: run make demo demo-seg first')
        content |= dict(
            command='python tools/maintenance/measure_export.py',
            machine=machine('cpu'),
            versions=versions(),
        )
        done = {(row['model'], row['to'], row['dtype']) for row in content['rows']}
        for row in rows():
            if row in done:
                continue
            print(*row, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                content['rows'].append(measure(*row, Path(folder)))
            write_text(OUT, json.dumps(content, indent=1) + '\n')
    text = PAGE.read_text()
    text = fill(text, 'exported', exported_table(content), MARKS)
    write_text(PAGE, fill(text, 'accuracy', accuracy_table(content), MARKS))
    return 0


if __name__ == '__main__':
    sys.exit(main())
