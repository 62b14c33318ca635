"""Trains configs/custom/own-small-data_atss_convnext-atto.py from scratch on 128 photos
of COCO, relabelled with eight classes, for several numbers of epochs, and measures each
on the training photos and on 32 others. Writes every run to one json file as it ends,
and a second start goes on from there; then writes the table of docs/own_data.md.

    python tools/maintenance/measure_own_data.py ../shared/data/coco_tiny
"""

import argparse
import json
import multiprocessing
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.apis.train import prepare
from convnext_mm.checkpoint.write import write_text
from convnext_mm.engine import launch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/custom/own-small-data_atss_convnext-atto.py'
OUT = ROOT / 'benchmarks/own_data_cpu.json'
PAGE = ROOT / 'docs/own_data.md'
# Of COCO's super-categories those in most photos.
CLASSES = (
    'person',
    'vehicle',
    'animal',
    'accessory',
    'food',
    'furniture',
    'kitchen',
    'electronic',
)
HELD_OUT = 5  # each fifth photo
MARKS = ('<!-- tools/maintenance/measure_own_data.py -->', '<!-- end -->')
METRICS = {'coco/bbox_mAP': 'AP', 'coco/bbox_mAP_50': 'AP50'}


def make_data(coco: Path, out: Path) -> None:
    """Writes photos and annotations, as the config expects them.

    Args:
        coco: Folder with ``train2017``, ``val2017`` and their annotations.
        out: Folder to write.
    """
    photos = []
    for split in ('train2017', 'val2017'):
        content = json.loads((coco / f'annotations/instances_{split}.json').read_text())
        groups = {c['id']: c['supercategory'] for c in content['categories']}
        for image in content['images']:
            objects = [
                dict(item, category_id=CLASSES.index(groups[item['category_id']]) + 1)
                for item in content['annotations']
                if item['image_id'] == image['id']
                and groups[item['category_id']] in CLASSES
            ]
            photos.append((coco / split / image['file_name'], image, objects))
    photos.sort(key=lambda photo: photo[0].name)
    held_out = photos[::HELD_OUT]
    kept = [photo for photo in photos if photo not in held_out]
    for name, part in (('train', kept), ('val', held_out)):
        (out / name).mkdir(parents=True, exist_ok=True)
        for path, _, _ in part:
            shutil.copy(path, out / name)
        (out / f'{name}.json').write_text(
            json.dumps(
                dict(
                    images=[image for _, image, _ in part],
                    annotations=[item for *_, objects in part for item in objects],
                    categories=[
                        dict(id=index, name=label)
                        for index, label in enumerate(CLASSES, start=1)
                    ],
                )
            )
        )


def own_config(folder: Path, epochs: int) -> Path:
    """A copy of the config with what a user changes."""
    text = CONFIG.read_text()
    for name, value in (
        ('_base_', str(CONFIG.parent / 'atss_convnext-t_fpn_1x_coco.py')),
        ('data_root', f'{folder}/'),
        ('classes', CLASSES),
        ('max_epochs', epochs),
    ):
        start = text.index(f'\n{name} = ') + 1
        end = text.index('\n', start)
        text = f'{text[:start]}{name} = {value!r}{text[end:]}'
    path = folder / f'own_{epochs}.py'
    path.write_text(text)
    return path


def settings() -> dict[str, Any]:
    """What results are of, as json has it."""
    content = Config.fromfile(CONFIG).to_dict()
    return json.loads(json.dumps(dict(config=CONFIG.name, content=content)))


def evaluate(runner: Runner, cfg: Config, split: str) -> dict[str, float]:
    """AP and AP50 of the trained model on the photos of a split."""
    loader, evaluator = cfg.val_dataloader.copy(), cfg.val_evaluator.copy()
    loader.dataset.ann_file, loader.dataset.data_prefix.img = (
        f'{split}.json',
        f'{split}/',
    )
    evaluator.ann_file = f'{cfg.data_root}{split}.json'
    # A data set of its own: the evaluator takes its classes.
    loop = runner.build_val_loop(dict(type='ValLoop'))
    loop.dataloader = runner.build_dataloader(loader)
    loop.evaluator = runner.build_evaluator(evaluator)
    loop.evaluator.dataset_meta = loop.dataloader.dataset.metainfo
    found = loop.run()
    return {name: found[key] for key, name in METRICS.items()}


def measure(data: Path, epochs: int, threads: int) -> dict[str, Any]:
    """One run; MMEngine wants a process for each."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as work_dir:
        options = {
            'train_cfg.val_interval': epochs + 1,
            # CPU time is this process's.
            **{f'{s}_dataloader.num_workers': 0 for s in ('train', 'val')},
            **{f'{s}_dataloader.persistent_workers': False for s in ('train', 'val')},
        }
        cfg = prepare(
            str(own_config(data, epochs)), work_dir=work_dir, cfg_options=options
        )
        with launch.running(cfg) as runner:
            cpu, wall = time.process_time(), time.monotonic()
            runner.train()
            cpu, wall = time.process_time() - cpu, time.monotonic() - wall
            return dict(
                epochs=epochs,
                iterations=runner.iter,
                minutes=round(wall / 60, 2),
                cpu_minutes=round(cpu / 60, 2),
                machine=machine(),
                train=evaluate(runner, cfg, 'train'),
                val=evaluate(runner, cfg, 'val'),
            )


def table(result: dict[str, Any]) -> str:
    """What the page shows of it."""
    rows = [
        '| {epochs} | {iterations} | {minutes:.0f} | {cpu_minutes:.0f} '
        '| {machine[threads]} | {machine[load_average][1]:.0f} '
        '| {train[AP50]:.2f} | {val[AP50]:.2f} |'.format(**run)
        for run in result['runs']
    ]
    processors = {
        f'{run["machine"]["cpu"]}, {run["machine"]["cores"]} cores'
        for run in result['runs']
    }
    return '\n'.join(
        [
            '| `max_epochs` | iterations | minutes | CPU minutes | threads | load '
            '| AP50, training photos | AP50, held-out photos |',
            '| --- ' * 8 + '|',
            *rows,
            '',
            f'{"; ".join(sorted(processors))}; PyTorch {result["versions"]["torch"]}.',
        ]
    )


def fill_page(result: dict[str, Any]) -> str:
    """The page with the table of a result."""
    start, end = MARKS
    return re.sub(
        f'(?<={re.escape(start)}\n).*?(?={re.escape(end)})',
        lambda _: table(result) + '\n',
        PAGE.read_text(),
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('coco', type=Path, help='folder of COCO, or a part of it')
    parser.add_argument('--out', type=Path, default=OUT, help='json to write')
    parser.add_argument(
        '--epochs', type=int, nargs='+', default=[12, 24, 48, 96], help='of each run'
    )
    parser.add_argument('--threads', type=int, default=2, help='of PyTorch (2)')
    args = parser.parse_args()
    result: dict[str, Any] = dict(
        command=shlex.join(
            ['python', 'tools/maintenance/measure_own_data.py', *sys.argv[1:]]
        ),
        settings=settings(),
        versions=versions(),
        runs=[],
    )
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before['settings'] != result['settings']:
            raise SystemExit(
                f'error: {args.out} has runs with other settings: give another --out'
            )
        result = before
    with tempfile.TemporaryDirectory() as data:
        make_data(args.coco, Path(data))
        for epochs in args.epochs:
            if epochs not in [run['epochs'] for run in result['runs']]:
                with multiprocessing.get_context('spawn').Pool(1) as pool:
                    run = pool.apply(measure, (Path(data), epochs, args.threads))
                result['runs'].append(run)
                write_text(args.out, json.dumps(result, indent=1) + '\n')
                print(run, flush=True)
    if args.out == OUT:
        PAGE.write_text(fill_page(result))


if __name__ == '__main__':
    main()
