"""``convnext-mm test NAME``: measured figures beside published ones."""

import dataclasses

import pytest
import torch

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis import test, zoo
from convnext_mm.apis.config import load_config
from convnext_mm.checkpoint.remote import cache_path
from convnext_mm.cli import main
from convnext_mm.datasets import write_shapes

NAME = 'mask-rcnn_convnext-atto_shapes'


def rows(text: str) -> list[list[str]]:
    return [line.replace('│', ' ').split() for line in text.splitlines()]


def test_compare(capsys):
    test.compare(
        {'coco/bbox_mAP': 0.4615, 'coco/segm_mAP': 0.418, 'coco/bbox_mAP_50': 0.6},
        zoo.find('mask-rcnn_convnext-t'),
    )
    said = rows(capsys.readouterr().out)
    assert ['box', 'AP', '(paper)', '46.15', '46.20', '-0.05'] in said
    assert ['mask', 'AP', '(paper)', '41.80', '41.70', '+0.10'] in said
    model = zoo.find('upernet_convnext-b')
    for tta, expected in (
        (False, ['mIoU', '(paper)', '49.50', '49.10', '+0.40']),
        (True, ['mIoU(ms+flip)', '(paper)', '49.50', '49.90', '-0.40']),
    ):
        test.compare({'mIoU': 49.5, 'aAcc': 80.0}, model, tta)
        said = [row for row in rows(capsys.readouterr().out) if '49.50' in row]
        assert said == [expected]


@pytest.mark.slow
def test_by_name(tmp_path, monkeypatch, capfd):
    """Weights from the cache, the config's data, and the table."""
    monkeypatch.setenv('CONVNEXT_MM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.chdir(tmp_path)
    address = 'https://example.com/weights.pth'
    model = dataclasses.replace(zoo.find(NAME), weights=address)
    monkeypatch.setattr(zoo, 'models', lambda: (model,))
    cache_path(address).parent.mkdir(parents=True)
    state = build_model(load_config(NAME), 'cpu').state_dict()
    torch.save(dict(state_dict=state), cache_path(address))
    write_shapes('data/shapes', 1, 2, 96)
    workers = 'test_dataloader.num_workers=0'
    persistent = 'test_dataloader.persistent_workers=False'
    assert main(['test', NAME, '--cfg-options', workers, persistent]) == 0
    found = [row for row in rows(capfd.readouterr().out) if row[:2] == ['box', 'AP']]
    assert len(found) == 1
    measured, published, difference = map(float, found[0][3:])
    assert published == 63.9
    assert difference == pytest.approx(measured - published, abs=0.011)
