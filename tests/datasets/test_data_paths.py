"""A path that does not exist: what there is near it, and where published data
comes from."""

import pytest
from mmengine.config import Config

from convnext_mm.datasets.data_check import DataError
from convnext_mm.datasets.data_paths import check_data

OWN = dict(metainfo=dict(classes=('a', 'b')))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data' / 'apples' / 'train').mkdir(parents=True)
    (tmp_path / 'data' / 'apples' / 'train.json').write_text('{}')
    return tmp_path


def message(**dataset):
    dataset = dict(type='CocoDataset', ann_file='train.json', **dataset)
    loader = dict(dataset=dict(dataset))
    with pytest.raises(DataError) as caught:
        check_data(Config(dict(train_dataloader=loader)), ['train_dataloader'])
    return str(caught.value)


@pytest.mark.parametrize('own', [{}, OWN])
def test_mistyped_root_names_close_folders(own, folder):
    said = message(data_root='data/appels/', **own)
    assert "ann_file 'data/appels/train.json' does not exist" in said
    assert str(folder) in said
    assert "'data' has no 'appels', but close to it 'apples'" in said
    assert 'http' not in said and '--data-root' in said


@pytest.mark.parametrize('own', [{}, OWN])
def test_mistyped_file_and_letters_of_another_case(own):
    said = message(data_root='data/apples', data_prefix=dict(img='Train/'), **own)
    assert "data_prefix.img 'data/apples/Train'" in said
    assert "close to it 'train'" in said and 'http' not in said


def test_deepest_folder_that_exists_and_what_it_has(folder):
    said = message(data_root='data/apples/a/b/c', **OWN)
    assert "'data/apples' has no 'a', but [train, train.json]" in said
    (folder / '.hidden').mkdir()
    for number in range(9):
        (folder / f'z{number}').mkdir()
    said = message(data_root='pears', **OWN)
    assert "'.' has no 'pears', but [data, z0, z1, z2, z3, ...]" in said
    said = message(data_root='z1/pears', **OWN)
    assert "'z1' is empty" in said
    said = message(data_root='data/apples/train.json/pears', **OWN)
    assert "'data/apples/train.json' cannot be listed (Not a directory)" in said


def test_published_data_is_to_be_had(folder):
    source = 'https://cocodataset.org'
    assert source in message(data_root='data/coco/')
    (folder / 'disk').mkdir()
    assert source in message(data_root='disk')
    assert source not in message(data_root='disc')
    assert source not in message(data_root='data/coco/', **OWN)
    assert source in message(data_root=str(folder / 'data' / 'coco'))
