"""convnext-mm convert-data: what it says, and how it ends."""

import json

import numpy as np
import pytest
from PIL import Image

from convnext_mm.cli import main


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Six pictures of a labelling program, without lists of names."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'labelled'
    folder.mkdir()
    for name in 'abcdef':
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / f'{name}.jpg')
        (folder / f'{name}.xml').write_text(
            '<annotation><object>\n<name>dog</name><bndbox><xmin>2</xmin>'
            '<ymin>3</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>'
        )
    return folder


def test_what_it_says(source, capsys):
    main(['convert-data', 'labelled', 'data/own', '--held-out', '33'])
    said = capsys.readouterr().out
    assert 'since the data set names none: 2 (labelled/' in said
    rows = {line[:17].strip(): line[17:].split() for line in said.splitlines()}
    assert rows['pictures'] == rows['dog'] == ['4', '2']
    assert "data_root = 'data/own/'" in said and "classes = ('dog',)" in said
    assert 'convnext-mm show data' in said and 'convnext-mm train' in said
    for split in ('train', 'val'):
        content = json.loads((source.parent / f'data/own/{split}.json').read_text())
        assert content['annotations'][0]['bbox'] == [1, 2, 8, 7]


def test_in_place(source, capsys):
    main(['convert-data', 'labelled', 'own', '--in-place', '--classes', 'cat', 'dog'])
    said = capsys.readouterr().out
    assert "train_images = val_images = ''" in said
    assert "classes = ('cat', 'dog')" in said
    assert not (source.parent / 'own/train').exists()


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (['labelled', 'own'], '1 mistake, and nothing is written'),
        (['nothing', 'own'], "'nothing' does not exist"),
        (['labelled', 'own', '--from', 'yolo'], 'no yaml file with names'),
        (['labelled', 'own', '--masks'], 'has no train.txt'),
        (['labelled', 'labelled/a.jpg', '--skip-mistakes'], 'cannot be written'),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, reason, source, capsys):
    (source / 'c.jpg').write_text('broken')
    with pytest.raises(SystemExit) as ended:
        main(['convert-data', *arguments])
    assert ended.value.code not in (0, None) and reason in str(ended.value.code)
    assert not (source.parent / 'own').exists()


def test_mistakes_that_are_left_out(source, capsys):
    (source / 'c.jpg').write_text('broken')
    main(['convert-data', 'labelled', 'own', '--skip-mistakes'])
    said = capsys.readouterr().out
    assert 'left out: labelled/c.jpg cannot be read as an image' in said
