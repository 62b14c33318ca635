"""Pascal VOC and YOLO to COCO: boxes come out where they were, and mistakes are named
with their file, line and value."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from convnext_mm.apis.convert_data import convert_data
from convnext_mm.datasets.data_check import check_dataset
from convnext_mm.datasets.errors import DataError
from convnext_mm.engine.errors import ConfigError

CLASSES = ['dog', 'cat']
SIZE = (60, 40)  # width, height


def photo(path: Path, size=SIZE, orientation=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def yolo(folder: Path, labels: dict[str, str | None], size=SIZE, **settings) -> Path:
    """``labels``: 'train/1' to the lines of its label file; None: there is none."""
    for name, lines in labels.items():
        photo(folder / 'images' / f'{name}.png', size)
        if lines is not None:
            path = folder / 'labels' / f'{name}.txt'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)
    content = dict(path='.', train='images/train', val='images/val', names=CLASSES)
    (folder / 'data.yaml').write_text(yaml.safe_dump({**content, **settings}))
    return folder


def xml(objects: str, size=SIZE) -> str:
    return (
        '<annotation>\n'
        f'<size><width>{size[0]}</width><height>{size[1]}</height></size>\n'
        f'{objects}</annotation>\n'
    )


def boxed(name: str, *corners: float, difficult: int = 0) -> str:
    """One line of an xml file."""
    tags = ('xmin', 'ymin', 'xmax', 'ymax')
    box = ''.join(f'<{tag}>{value}</{tag}>' for tag, value in zip(tags, corners))
    return (
        f'<object><name>{name}</name><difficult>{difficult}</difficult>'
        f'<bndbox>{box}</bndbox></object>\n'
    )


def voc(folder: Path, splits: dict[str, dict[str, str]], size=SIZE) -> Path:
    for split, files in splits.items():
        for name, text in files.items():
            photo(folder / 'JPEGImages' / f'{name}.jpg', size)
            path = folder / 'Annotations' / f'{name}.xml'
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(f'{name}  1' for name in files))
    return folder


def written(target: Path, split: str = 'train') -> dict:
    return json.loads((target / f'{split}.json').read_text())


def boxes(content: dict) -> list[list[float]]:
    return [item['bbox'] for item in content['annotations']]


GOOD = {
    'train/1': '0 0.5 0.5 0.5 0.5\n1 0.1 0.1 0.2 0.2\n',
    'train/2': '',
    'val/3': '1 0.25 0.25 0.5 0.5\n',
}


def test_yolo(tmp_path):
    labels = {**GOOD, 'train/4': '0 0.1 0.1 0.9 0.1 0.9 0.5\n', 'val/5': None}
    report = convert_data(yolo(tmp_path / 'in', labels), tmp_path / 'out')
    train, val = (written(tmp_path / 'out', split) for split in ('train', 'val'))
    assert [c['name'] for c in train['categories']] == CLASSES == report.classes
    assert [i['file_name'] for i in train['images']] == ['1.png', '2.png', '4.png']
    assert {(i['width'], i['height']) for i in train['images']} == {SIZE}
    assert boxes(train) == [[15, 10, 30, 20], [0, 0, 12, 8], [6, 4, 48, 16]]
    assert [a['category_id'] for a in train['annotations']] == [1, 2, 1]
    polygon = train['annotations'][2]
    assert polygon['segmentation'] == [[6, 4, 54, 4, 54, 20]]
    assert polygon['area'] == 48 * 16 / 2
    assert 'segmentation' not in train['annotations'][0]
    assert boxes(val) == [[0, 0, 30, 20]] and len(val['images']) == 2
    split = report.splits['train']
    assert (split.pictures, split.empty, split.objects, split.with_mask) == (3, 1, 3, 1)
    assert split.by_class == {'dog': 2, 'cat': 1}
    link = tmp_path / 'out/train/1.png'
    assert link.resolve() == tmp_path / 'in/images/train/1.png'
    [(kind, places)] = report.findings.notes.items()
    assert 'no label file' in kind and places == [str(tmp_path / 'in/images/val/5.png')]


def test_voc(tmp_path):
    """Counted from 1, and the last pixel is inside: 1 to 60 is the whole width."""
    first = boxed('dog', 1, 1, 60, 40) + boxed('cat', 11, 6, 20, 6, difficult=1)
    source = voc(
        tmp_path / 'in',
        dict(
            train={'a': xml(first), 'b': xml('')},
            val={'c': xml(boxed('ant', 5, 5, 9, 9))},
        ),
    )
    report = convert_data(source, tmp_path / 'out')
    train = written(tmp_path / 'out')
    assert report.classes == ['ant', 'cat', 'dog']
    assert boxes(train) == [[0, 0, 60, 40], [10, 5, 10, 1]]
    assert [a['iscrowd'] for a in train['annotations']] == [0, 1]
    assert [a['category_id'] for a in train['annotations']] == [3, 2]
    assert boxes(written(tmp_path / 'out', 'val')) == [[4, 4, 5, 5]]
    assert report.splits['train'].empty == 1


def test_voc_counted_from_zero(tmp_path):
    files = {'a': xml(boxed('dog', 0, 5, 20, 10)), 'b': xml(boxed('dog', 5, 5, 9, 9))}
    source = voc(tmp_path / 'in', dict(train=files, val=files))
    report = convert_data(source, tmp_path / 'out')
    assert boxes(written(tmp_path / 'out')) == [[0, 5, 20, 5], [5, 5, 4, 4]]
    assert any('count from 0' in kind for kind in report.findings.notes)
    convert_data(source, tmp_path / 'said', first_pixel=1)
    assert boxes(written(tmp_path / 'said'))[1] == [4, 4, 5, 5]


def test_voc_beside_the_pictures(tmp_path):
    """As labelling programs write it: one folder, no lists of names."""
    for name in 'abcdefghij':
        photo(tmp_path / f'in/{name}.jpg')
        (tmp_path / f'in/{name}.xml').write_text(xml(boxed('dog', 2, 2, 9, 9)))
    report = convert_data(tmp_path / 'in', tmp_path / 'out', classes=('cat', 'dog'))
    assert [s.pictures for s in report.splits.values()] == [8, 2]
    assert report.classes == ['cat', 'dog']
    again = convert_data(tmp_path / 'in', tmp_path / 'again', held_out=50)
    assert [s.pictures for s in again.splits.values()] == [5, 5]
    alone = convert_data(tmp_path / 'in', tmp_path / 'alone', held_out=0)
    assert list(alone.splits) == ['train']


def test_voc_masks(tmp_path):
    from pycocotools.mask import decode

    objects = boxed('dog', 11, 11, 20, 15) + boxed('cat', 30, 30, 33, 33)
    source = voc(
        tmp_path / 'in', dict(train={'a': xml(objects)}, val={'a': xml(objects)})
    )
    (source / 'ImageSets/Main').rename(source / 'ImageSets/Segmentation')
    numbers = np.zeros(SIZE[::-1], np.uint8)
    numbers[10:15, 10:20] = 1
    numbers[0, 0] = 255  # the border between objects
    mask = Image.fromarray(numbers)
    mask.putpalette([value // 3 for value in range(768)])
    (source / 'SegmentationObject').mkdir()
    mask.save(source / 'SegmentationObject/a.png')
    report = convert_data(source, tmp_path / 'out', masks=True)
    dog, cat = written(tmp_path / 'out')['annotations']
    assert dog['area'] == 50 and 'segmentation' not in cat
    decoded = decode(dog['segmentation'])
    assert decoded.shape == SIZE[::-1] and decoded.sum() == 50
    assert decoded[10:15, 10:20].all()
    assert any('no mask' in kind for kind in report.findings.notes)
    mask.resize((10, 10)).save(source / 'SegmentationObject/a.png')
    with pytest.raises(
        DataError, match=r'none of the pictures of train .*a.png has the shape'
    ):
        convert_data(source, tmp_path / 'other', masks=True)


@pytest.mark.parametrize('kind', ['yolo', 'voc', 'polygons'])
def test_the_result_loads(kind, tmp_path, caplog):
    """In MMDetection, pycocotools and the package's own check, without a warning."""
    mmdet = pytest.importorskip('mmdet.datasets')
    from mmengine.registry import DefaultScope
    from pycocotools.coco import COCO

    if kind == 'voc':
        files = {'a': xml(boxed('cat', 2, 2, 20, 20) + boxed('dog', 9, 9, 30, 30))}
        source = voc(tmp_path / 'in', dict(train=files, val=files))
    elif kind == 'polygons':
        lines = '1 0.1 0.1 0.9 0.1 0.9 0.5\n'
        source = yolo(tmp_path / 'in', {'train/1': lines, 'val/1': lines})
    else:
        source = yolo(tmp_path / 'in', GOOD)
    report = convert_data(source, tmp_path / 'out')
    number = report.splits['train'].objects
    assert len(COCO(str(tmp_path / 'out/train.json')).anns) == number
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=kind == 'polygons'),
    ]
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = mmdet.CocoDataset(
            data_root=f'{tmp_path}/out/',
            ann_file='train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=report.classes),
            pipeline=pipeline,
        )
        with caplog.at_level(logging.WARNING):
            check_dataset(dataset)
    assert not caplog.records
    loaded = [dataset[index] for index in range(len(dataset))]
    assert sum(len(sample['gt_bboxes']) for sample in loaded) == number
    assert loaded[0]['img'].shape == (*SIZE[::-1], 3)
    assert [report.classes[i] for i in loaded[0]['gt_bboxes_labels']] == list(
        {'yolo': ['dog', 'cat'], 'voc': ['cat', 'dog'], 'polygons': ['cat']}[kind]
    )


def test_in_place_and_folders(tmp_path):
    """Pictures of several folders may have one name."""
    labels = {'a/1': '0 0.5 0.5 1 1', 'b/1': '1 0.5 0.5 1 1', 'val/1': ''}
    source = yolo(tmp_path / 'in', labels, train=['images/a', 'images/b'])
    convert_data(source / 'data.yaml', tmp_path / 'out')
    names = [i['file_name'] for i in written(tmp_path / 'out')['images']]
    assert names == ['a/1.png', 'b/1.png']
    assert all((tmp_path / 'out/train' / name).is_file() for name in names)
    convert_data(source, tmp_path / 'deep/out', in_place=True)
    names = [i['file_name'] for i in written(tmp_path / 'deep/out')['images']]
    assert names == ['../../in/images/a/1.png', '../../in/images/b/1.png']
    assert not (tmp_path / 'deep/out/train').exists()
    with pytest.raises(ConfigError, match=r"train.json' exists: name a new folder"):
        convert_data(source, tmp_path / 'out')


def test_a_yaml_of_another_machine(tmp_path):
    """Lists of files, numbered names, and a path that is not here."""
    source = yolo(
        tmp_path / 'in',
        GOOD,
        path='/nowhere/else',
        train='train.txt',
        val='../images/val',
        names={0: 'dog', 1: 'cat'},
        nc=2,
    )
    (source / 'train.txt').write_text('./images/train/1.png\n\n./images/train/2.png\n')
    report = convert_data(source, tmp_path / 'out')
    assert report.splits['train'].pictures == 2 and report.classes == CLASSES


@pytest.mark.parametrize('orientation, turned', [(1, False), (3, False), (6, True)])
def test_orientation(orientation, turned, tmp_path):
    """YOLO's shares are of the picture as it is shown, which mmcv loads."""
    mmcv = pytest.importorskip('mmcv')
    source = yolo(tmp_path / 'in', GOOD)
    path = photo(source / 'images/train/1.png', orientation=orientation)
    report = convert_data(source, tmp_path / 'out')
    content = written(tmp_path / 'out')
    image = content['images'][0]
    assert (image['height'], image['width']) == mmcv.imread(str(path)).shape[:2]
    assert boxes(content)[0] == ([10, 15, 20, 30] if turned else [15, 10, 30, 20])
    assert any('EXIF' in kind for kind in report.findings.notes) == turned


def test_boxes_of_a_picture_that_is_not_turned(tmp_path):
    files = {'a': xml(boxed('dog', 2, 2, 9, 9)), 'b': xml(boxed('dog', 2, 2, 9, 9))}
    source = voc(tmp_path / 'in', dict(train=files, val=files))
    photo(source / 'JPEGImages/a.jpg', orientation=6)
    with pytest.raises(DataError, match=r'a.xml:2: size is 60 x 40.* 40 x 60 .*EXIF'):
        convert_data(source, tmp_path / 'out')


@pytest.mark.parametrize(
    'line, reason',
    [
        (
            '2 0.5 0.5 0.1 0.1',
            'the class 2 is outside of names, [dog, cat]: use 0 to 1',
        ),
        ('-1 0.5 0.5 0.1 0.1', 'the class -1 is outside'),
        ('0.5 0.5 0.5 0.1 0.1', 'the class 0.5 is outside'),
        ('0 0.5 0.5 0.1', '3 numbers follow the class'),
        ('0 0.1 0.1 0.2 0.1 0.2 0.2 0.3', '7 numbers follow the class'),
        ('0 30 0.5 0.1 0.1', '30 is outside of 0 to 1'),
        ('0 0.5 -0.2 0.1 0.1', '-0.2 is outside of 0 to 1'),
        ('0 0.5 0.5 0 0.1', '0 0.1: width and height are above 0'),
        ('0 0.1 0.1 0.2 0.1 0.3 0.1', 'has no area'),
        ('0 0.5 0.5 nan 0.1', "'nan' is no number"),
        ('dog 0.5 0.5 0.1 0.1', "'dog' is no number"),
    ],
)
def test_mistakes_of_yolo(line, reason, tmp_path):
    source = yolo(tmp_path / 'in', {**GOOD, 'train/1': f'0 0.5 0.5 1 1\n{line}\n'})
    with pytest.raises(DataError) as raised:
        convert_data(source, tmp_path / 'out')
    assert f'{source}/labels/train/1.txt:2: ' in str(raised.value)
    assert reason in str(raised.value) and '--skip-mistakes' in str(raised.value)
    assert not (tmp_path / 'out').exists()
    report = convert_data(source, tmp_path / 'out', skip_mistakes=True)
    assert report.splits['train'].objects == len(report.findings.mistakes) == 1


def test_rounding_is_cut_off(tmp_path):
    lines = '0 1.000001 0.5 0.5 0.5\n0 0.2 0.2 0.4 0.4\n0 0.2 0.2 0.4 0.4\n'
    source = yolo(tmp_path / 'in', {**GOOD, 'train/1': lines})
    report = convert_data(source, tmp_path / 'out')
    assert boxes(written(tmp_path / 'out'))[0] == pytest.approx([45, 10, 15, 20])
    cut, twice = report.findings.notes.values()
    assert cut == [f'{source}/labels/train/1.txt:1']
    assert twice == [f'{source}/labels/train/1.txt:3']


@pytest.mark.parametrize(
    'objects, reason',
    [
        (boxed('dog', 5, 5, 'x', 9), "a.xml:3: xmax is 'x', no number"),
        (
            boxed('dog', 9, 5, 5, 9),
            'a.xml:3: xmin 9, ymin 5, xmax 5, ymax 9: the small',
        ),
        (boxed('dog', 5, 5, 99, 9), 'outside of the picture of 60 x 40 pixels'),
        (boxed('', 5, 5, 9, 9), 'a.xml:3: an object without a name'),
        (
            '<object><name>dog</name></object>\n',
            "a.xml:3: the object 'dog' has no bndb",
        ),
        (boxed('cow', 5, 5, 9, 9), 'objects of [cow], which is not among the classes'),
    ],
)
def test_mistakes_of_voc(objects, reason, tmp_path):
    files = {'a': xml(objects), 'b': xml(boxed('dog', 5, 5, 9, 9))}
    source = voc(tmp_path / 'in', dict(train=files, val={'b': files['b']}))
    with pytest.raises(DataError) as raised:
        convert_data(source, tmp_path / 'out', classes=tuple(CLASSES))
    assert reason in str(raised.value)
    report = convert_data(
        source, tmp_path / 'out', classes=tuple(CLASSES), skip_mistakes=True
    )
    assert report.splits['train'].objects == 1


ENTITIES = '<!DOCTYPE a [<!ENTITY x "dog">]>\n' + xml(boxed('&x;', 5, 5, 9, 9))


@pytest.mark.parametrize(
    'text, reason',
    [
        ('<annotation>', 'is no xml file'),
        (ENTITIES, 'a.xml:1: it has a DOCTYPE'),
        (xml('', size=(61, 40)), 'a.xml:2: size is 61 x 40, but '),
        (None, 'a.xml does not exist'),
        ('<?xml version="1.0" encoding="gb2312"?>\n<a/>', 'a.xml cannot be read (mul'),
        ('<?xml version="1.0" encoding="klingon"?>\n<a/>', 'save it as UTF-8'),
    ],
)
def test_files_of_voc(text, reason, tmp_path):
    files = {'a': text or '', 'b': xml(boxed('dog', 5, 5, 9, 9))}
    source = voc(tmp_path / 'in', dict(train=files, val={'b': files['b']}))
    if text is None:
        (source / 'Annotations/a.xml').unlink()
    with pytest.raises(DataError) as raised:
        convert_data(source, tmp_path / 'out')
    assert reason in str(raised.value)


def test_pictures_that_cannot_be_read(tmp_path):
    source = yolo(tmp_path / 'in', {**GOOD, 'train/4': '', 'train/5': ''})
    whole = (source / 'images/train/1.png').read_bytes()
    (source / 'images/train/4.png').write_bytes(whole[: len(whole) // 2])
    (source / 'images/train/5.png').write_text('no picture')
    photo(source / 'images/train/2.jpg')
    with pytest.raises(DataError, match='3 mistakes') as raised:
        convert_data(source, tmp_path / 'out')
    said = str(raised.value)
    assert f'{source}/images/train/4.png cannot be read as an image' in said
    assert f'{source}/images/train/5.png cannot be read as an image' in said
    assert 'share the label file' in said
    report = convert_data(source, tmp_path / 'out', skip_mistakes=True)
    assert report.splits['train'].pictures == 2


@pytest.mark.parametrize(
    'settings, reason',
    [
        (dict(names='dog'), "names is 'dog': give a list"),
        (dict(names=['dog', 'dog']), 'must be distinct names'),
        (dict(names={1: 'dog', 2: 'cat'}), 'number the classes from 0 to 1'),
        (dict(nc=80), 'nc is 80, but the number of names is 2'),
        (dict(kpt_shape=[17, 3]), 'labels with keypoints are not converted'),
        (dict(train=None), 'has no train'),
        (dict(names=[True, 'cat']), 'names has True, as which yaml reads a bare yes'),
        (dict(names=['dog', None]), 'names has None'),
        (dict(names={'0': 'dog', 0: 'cat'}), 'number the classes from 0 to 1'),
        (dict(val='images/valid'), "'images/valid' does not exist"),
        (dict(val='labels'), 'holds no images'),
        (dict(val='data.yaml'), 'is neither a folder nor a .txt file'),
    ],
)
def test_yaml_files(settings, reason, tmp_path):
    source = yolo(tmp_path / 'in', GOOD, **settings)
    with pytest.raises(DataError) as raised:
        convert_data(source, tmp_path / 'out')
    assert f'{source}/data.yaml' in str(raised.value) and reason in str(raised.value)


def test_a_broken_yaml_file(tmp_path):
    source = yolo(tmp_path / 'in', GOOD)
    (source / 'data.yaml').write_text('train: images\nnames: [dog\nnc: 1\n')
    with pytest.raises(DataError, match=r'data.yaml:3 is no yaml \(.*\): ') as raised:
        convert_data(source, tmp_path / 'out')
    assert '\n' not in str(raised.value)


def test_names_numbered_with_text(tmp_path):
    numbered = {str(index): f'class {index}' for index in reversed(range(11))}
    source = yolo(tmp_path / 'in', GOOD, names=numbered)
    report = convert_data(source, tmp_path / 'out')
    assert report.classes == [f'class {index}' for index in range(11)]


def test_pictures_listed_twice(tmp_path):
    """In one split: kept once. In train and in val: kept, with a note."""
    source = yolo(tmp_path / 'in', GOOD, train=['images/train', 'list.txt'])
    (source / 'list.txt').write_text('images/train/../train/2.png\nimages/val/3.png\n')
    report = convert_data(source, tmp_path / 'out')
    assert [s.pictures for s in report.splits.values()] == [3, 1]
    repeated, shared = report.findings.notes.items()
    assert 'more than once' in repeated[0] and len(repeated[1]) == 1
    assert 'no forecast' in shared[0] and shared[1] == [f'{source}/images/val/3.png']
    files = {'a': xml(boxed('dog', 5, 5, 9, 9, difficult=1))}
    source = voc(tmp_path / 'voc', dict(train=files, val=files))
    (source / 'ImageSets/Main/train.txt').write_text('a\na\n')
    report = convert_data(source, tmp_path / 'of_voc')
    assert report.splits['train'].pictures == 1
    assert [len(places) for places in report.findings.notes.values()] == [1, 1, 1]


def test_lists_of_voc(tmp_path):
    """Empty ones, a byte order mark, endings, and another encoding."""
    files = {name: xml(boxed('dog', 5, 5, 9, 9)) for name in 'abcde'}
    source = voc(tmp_path / 'in', dict(train=files, val={}, test={}))
    train = source / 'ImageSets/Main/train.txt'
    train.write_text('a.jpg\nb.JPG\nc\nd\ne\n', encoding='utf-8-sig')
    report = convert_data(source, tmp_path / 'out')
    assert [(n, s.pictures) for n, s in report.splits.items()] == [
        ('train', 4),
        ('val', 1),
    ]
    [empty] = [p for kind, p in report.findings.notes.items() if 'lists' in kind]
    assert [Path(path).name for path in empty] == ['val.txt', 'test.txt']
    train.write_bytes('ä'.encode('latin-1'))
    with pytest.raises(DataError, match='train.txt is no text in UTF-8'):
        convert_data(source, tmp_path / 'other')
    train.write_text('')
    with pytest.raises(DataError, match='lists no pictures to train on'):
        convert_data(source, tmp_path / 'other')


def test_encodings_of_yolo(tmp_path):
    source = yolo(tmp_path / 'in', GOOD, train='list.txt')
    listed = source / 'list.txt'
    listed.write_text('images/train/1.png\n', encoding='utf-8-sig')
    label = source / 'labels/train/1.txt'
    label.write_text(GOOD['train/1'], encoding='utf-8-sig')
    assert convert_data(source, tmp_path / 'out').splits['train'].objects == 2
    for path in (label, listed):
        path.write_bytes('ä'.encode('latin-1'))
        with pytest.raises(DataError, match=f'{path} is no text in UTF-8'):
            convert_data(source, tmp_path / 'other')


def test_pictures_of_one_name_in_voc(tmp_path):
    files = {name: xml(boxed('dog', 5, 5, 9, 9)) for name in 'ab'}
    source = voc(tmp_path / 'in', dict(train=files, val=files))
    (source / 'JPEGImages/b.png').symlink_to('b.jpg')  # the same picture
    photo(source / 'JPEGImages/a.png')
    with pytest.raises(DataError, match=r'1 mistake, .*\n.*a.png and .*a.jpg share'):
        convert_data(source, tmp_path / 'out')


@pytest.mark.parametrize('size', ['', '<width></width><height> </height>'])
def test_no_size_in_voc(size, tmp_path):
    text = f'<annotation><size>{size}</size>{boxed("dog", 5, 5, 9, 9)}</annotation>'
    source = voc(tmp_path / 'in', dict(train={'a': text}, val={'a': text}))
    assert convert_data(source, tmp_path / 'out').splits['train'].objects == 1


def test_files_of_other_types(tmp_path):
    source = yolo(tmp_path / 'in', GOOD)
    path = photo(source / 'images/train/4.gif')
    report = convert_data(source, tmp_path / 'out')
    [(kind, places)] = report.findings.notes.items()
    assert 'none of .bmp, .jpeg' in kind and places == [str(path)]


def test_a_split_of_broken_pictures(tmp_path):
    source = yolo(tmp_path / 'in', GOOD)
    (source / 'images/val/3.png').write_text('broken')
    with pytest.raises(DataError, match='; correct that, or list other .* for val'):
        convert_data(source, tmp_path / 'out', skip_mistakes=True)


def test_what_is_given(tmp_path):
    source = yolo(tmp_path / 'in', GOOD)
    (tmp_path / 'empty').mkdir()
    for arguments, kind, reason in (
        (dict(source=tmp_path / 'none'), DataError, 'does not exist'),
        (dict(source=tmp_path / 'empty'), DataError, 'no data set that is known'),
        (dict(source=source, kind='voc'), DataError, 'no folder Annotations'),
        (dict(source=source, masks=True), ConfigError, '--masks is for Pascal VOC'),
        (dict(source=source / 'no.yaml'), DataError, "no.yaml' does not exist"),
    ):
        with pytest.raises(kind, match=reason):
            convert_data(target=tmp_path / 'out', **arguments)
    voc(source, dict(train={'a': xml(boxed('dog', 5, 5, 9, 9))}))
    with pytest.raises(ConfigError, match='say which with --from'):
        convert_data(source, tmp_path / 'out')
    (source / 'labels/train/1.txt').unlink()
    for path in source.glob('labels/*/*.txt'):
        path.unlink()
    with pytest.raises(DataError, match='none of the pictures .3. has a label file'):
        convert_data(source, tmp_path / 'out', kind='yolo')
    two = voc(tmp_path / 'two/a', {}), voc(tmp_path / 'two/b', {})
    for folder in two:
        (folder / 'Annotations').mkdir(parents=True)
    with pytest.raises(DataError, match='holds several data sets'):
        convert_data(tmp_path / 'two', tmp_path / 'out')
