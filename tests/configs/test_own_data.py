"""docs/own_data.md: a newcomer who types what it says gets there."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from convnext_mm.datasets import CLASSES, write_shapes
from repo import ROOT, load_tool
from warm_python import warm_python

pytest.importorskip('mmdet')
CONFIG = 'custom/own-small-data_atss_convnext-atto.py'
PAGE = (ROOT / 'docs/own_data.md').read_text()


def section(title: str) -> list[str]:
    """The commands of a part of the page."""
    text = re.search(rf'^## {title}\n(.*?)(?=^## )', PAGE, re.DOTALL | re.MULTILINE)[1]
    blocks = re.findall(r'```bash\n(.*?)```', text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def call(line: str, folder: Path) -> str:
    """What a command prints that is typed in a folder."""
    words = shlex.split(line)
    if words[0] == 'convnext-mm':
        words[:1] = [warm_python(), '-m', 'convnext_mm']
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f'{line}\n{done.stdout[-6000:]}'
    return done.stdout


def change(path: Path, **values: object) -> None:
    """Sets variables at the top level of a config, as a user does."""
    text = path.read_text()
    for name, value in values.items():
        text, number = re.subn(rf'(?m)^{name} = .*$', f'{name} = {value!r}', text)
        assert number == 1, f'{name} is not one line of {path}'
    path.write_text(text)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Drawn shapes in YOLO's layout, in ``datasets/mine``."""
    folder = tmp_path_factory.mktemp('newcomer')
    mine = folder / 'datasets/mine'
    write_shapes(folder / 'drawn', num_train=4, num_val=2, size=96)
    for ours, theirs in (('train', 'training'), ('val', 'validation')):
        drawn = folder / 'drawn'
        content = json.loads(
            (drawn / f'annotations/instances_{theirs}.json').read_text()
        )
        (mine / 'images' / ours).mkdir(parents=True)
        (mine / 'labels' / ours).mkdir(parents=True)
        for image in content['images']:
            name = Path(image['file_name']).stem
            picture = cv2.imread(str(drawn / 'images' / theirs / image['file_name']))
            cv2.imwrite(str(mine / 'images' / ours / f'{name}.jpg'), picture)
            (mine / 'labels' / ours / f'{name}.txt').write_text(
                ''.join(
                    f'{item["category_id"] - 1} {(x + w / 2) / 96} {(y + h / 2) / 96} '
                    f'{w / 96} {h / 96}\n'
                    for item in content['annotations']
                    if item['image_id'] == image['id']
                    for x, y, w, h in [item['bbox']]
                )
            )
    names = ', '.join(CLASSES)
    (mine / 'data.yaml').write_text(
        f'path: .\ntrain: images/train\nval: images/val\nnames: [{names}]\n'
    )
    return folder


@pytest.fixture(scope='module')
def prepared(folder):
    """After the first commands, and the lines that they say to write."""
    commands = section('The whole way')
    said = call(commands[0], folder)
    for line in commands[1:3]:
        call(line, folder)
    config = folder / 'my_configs/custom/mine.py'
    printed = dict(re.findall(r'^  (data_root|classes) = (.*)$', said, re.MULTILINE))
    values = {name: eval(value) for name, value in printed.items()}
    assert values == dict(data_root='data/own/', classes=tuple(CLASSES))
    change(config, **values, max_epochs=1, size=64, batch_size=2)
    return folder


@pytest.mark.slow
def test_looking_at_the_data(prepared):
    [line] = [x for x in section('The whole way') if x.startswith('convnext-mm show d')]
    call(line, prepared)
    assert list((prepared / 'work_dirs/mine/show').iterdir())


@pytest.mark.slow
def test_training(prepared):
    train, show, infer = section('The whole way')[-3:]
    assert 'Epoch(val) [1]' in call(train, prepared)
    assert (prepared / 'work_dirs/mine/epoch_1.pth').is_file()
    call(show, prepared)
    assert (prepared / 'work_dirs/mine/show/runs.png').is_file()
    call(infer, prepared)
    assert len(list((prepared / 'outputs/pictures').iterdir())) == 2


def test_other_ways_are_the_same_commands():
    """What the page says of YOLO and VOC is tested in tests/datasets."""
    for title in ('YOLO', 'Pascal VOC'):
        assert section(title)[0] == section('The whole way')[0]


def test_the_small_config():
    cfg = Config.fromfile(ROOT / 'configs' / CONFIG)
    number = len(cfg.classes)
    assert cfg.model.bbox_head.num_classes == number == 5
    assert cfg.model.backbone.init_cfg.type == 'Kaiming'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.data_root == cfg.data_root
        assert tuple(loader.dataset.metainfo.classes) == cfg.classes
    assert cfg.param_scheduler[1].end == cfg.train_cfg.max_epochs == cfg.max_epochs


def test_the_table_is_the_result():
    tool = load_tool('maintenance/measure_own_data')
    result = json.loads(tool.OUT.read_text())
    assert result['runs'] and tool.fill_page(result) == PAGE
    assert result['settings'] == tool.settings()


def test_the_measured_data(tmp_path, shared_dir):
    """128 photos and 32 others, none in both, of eight classes."""
    coco = shared_dir / 'data/coco_tiny'
    tool = load_tool('maintenance/measure_own_data')
    tool.make_data(coco, tmp_path)
    photos = {}
    for split, number in (('train', 128), ('val', 32)):
        content = json.loads((tmp_path / f'{split}.json').read_text())
        photos[split] = {image['file_name'] for image in content['images']}
        assert len(photos[split]) == number
        assert all((tmp_path / split / name).is_file() for name in photos[split])
        assert {a['category_id'] for a in content['annotations']} == set(range(1, 9))
    assert not photos['train'] & photos['val']
    cfg = Config.fromfile(tool.own_config(tmp_path, 12))
    assert cfg.train_cfg.max_epochs == 12 and cfg.model.bbox_head.num_classes == 8
