"""Bad data: each case ends before or at the first batch, and says which file is
at fault and what to do."""

import importlib.util
import json
import pickle
import re
import shutil

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from torch import nn

from convnext_mm.datasets.data_check import (
    DataError,
    GuardedLoad,
    check_dataset,
    explain_failure,
)
from convnext_mm.datasets.data_paths import check_data
from repo import ROOT

DETECTOR = 'configs/demo/mask-rcnn_convnext-atto_shapes.py'
SEGMENTOR = 'configs/demo/upernet_convnext-atto_shapes.py'


def train(config, data, *options, workers=0):
    """Runs tools/train.py until it stops by itself, and gives its message."""
    spec = importlib.util.spec_from_file_location('train', ROOT / 'tools/train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loaders = [
        f'{name}_dataloader.{option}'
        for name in ('train', 'val')
        for option in (f'num_workers={workers}', f'persistent_workers={workers > 0}')
    ]
    with pytest.raises(SystemExit) as caught:
        module.main(
            [
                config,
                '--data-root',
                str(data),
                '--work-dir',
                str(data / 'work'),
                '--cfg-options',
                'train_cfg.max_iters=3',
                *loaders,
                *options,
            ]
        )
    said, more = str(caught.value).splitlines()
    assert said.startswith('error: ') and more.startswith('More: docs/')
    assert not list((data / 'work').glob('*.pth'))
    return said


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    'config, missing',
    [
        (DETECTOR, 'annotations/instances_training.json'),
        (DETECTOR, 'images/validation'),
        (SEGMENTOR, 'annotations/training'),
        (SEGMENTOR, 'images/validation'),
    ],
)
def test_missing_paths(config, missing, data):
    (data / missing).rename(data / 'elsewhere')
    said = train(config, data)
    assert missing in said and 'does not exist' in said
    assert '--data-root' in said and 'convnext_mm.datasets' in said
    shutil.rmtree(data)
    data.mkdir()
    assert 'does not exist' in train(config, data)


@pytest.mark.slow
@pytest.mark.parametrize('split', ['training', 'validation'])
@pytest.mark.parametrize('config', [DETECTOR, SEGMENTOR])
def test_image_that_is_missing(config, split, data):
    path = data / 'images' / split / '00001.png'
    path.unlink()
    said = train(config, data)
    assert str(path) in said and ', or take' in said
    assert ('1 files of' if config == DETECTOR else '1 class maps') in said


def test_class_map_that_is_missing(data):
    path = data / 'annotations' / 'training' / '00001.png'
    path.unlink()
    assert str(path) in train(SEGMENTOR, data)


@pytest.mark.slow
@pytest.mark.parametrize('content', [b'', b'no image', None])
@pytest.mark.parametrize(
    'config, kind',
    [(DETECTOR, 'images'), (SEGMENTOR, 'images'), (SEGMENTOR, 'annotations')],
)
def test_unreadable_files(config, kind, content, data):
    path = data / kind / 'training' / '00002.png'
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    said = train(config, data)
    assert str(path) in said and 'cannot be read' in said
    assert 'replace it' in said


@pytest.mark.slow
def test_unreadable_image_outside_the_sample(data, monkeypatch):
    """Found when it is loaded, in a worker process too."""
    monkeypatch.setattr('convnext_mm.datasets.data_check.NUM_SAMPLES', 1)
    for name in ('00001.png', '00002.png'):
        (data / 'images' / 'training' / name).write_bytes(b'no image')
    said = train(DETECTOR, data, workers=1)
    assert 'images/training/0000' in said and 'cannot be read' in said


@pytest.mark.slow
def test_classes_that_the_annotations_lack(data):
    path = data / 'annotations' / 'instances_training.json'

    def rename(content):
        content['categories'][1]['name'] = 'wheel'

    edit_json(path, rename)
    said = train(DETECTOR, data)
    assert str(path) in said and '[triangle]' in said and 'wheel' in said
    assert 'metainfo' in said


@pytest.mark.slow
def test_class_order_differs_from_the_file(data):
    said = train(
        DETECTOR,
        data,
        'train_dataloader.dataset.metainfo.classes='
        "('triangle','circle','square','star','cross')",
    )
    assert 'instances_training.json' in said and 'order' in said


@pytest.mark.slow
def test_classes_are_a_string(data):
    said = train(DETECTOR, data, 'train_dataloader.dataset.metainfo.classes=circle')
    assert "('circle', )" in said


@pytest.mark.slow
def test_some_classes_only(data, capsys):
    said = train(
        DETECTOR, data, "train_dataloader.dataset.metainfo.classes=('circle','square')"
    )
    assert 'roi_head.bbox_head.num_classes is 5' in said
    assert 'num_classes=2' in said


@pytest.mark.slow
@pytest.mark.parametrize(
    'config, head', [(DETECTOR, 'roi_head.mask_head'), (SEGMENTOR, 'auxiliary_head')]
)
def test_head_of_another_class_count(config, head, data):
    said = train(config, data, f'model.{head}.num_classes=9')
    assert f'model.{head}.num_classes is 9' in said
    assert 'circle' in said and 'num_classes=' in said


@pytest.mark.slow
@pytest.mark.parametrize('split', ['training', 'validation'])
def test_label_above_the_class_count(split, data):
    path = data / 'annotations' / split / '00001.png'
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[:3] = 17
    labels[3:6] = 255  # is ignored
    cv2.imwrite(str(path), labels)
    said = train(SEGMENTOR, data)
    assert str(path) in said and '[17]' in said and '6 classes' in said
    assert 'metainfo.classes' in said


@pytest.mark.slow
def test_label_outside_the_sample(data, monkeypatch):
    monkeypatch.setattr('convnext_mm.datasets.data_check.NUM_SAMPLES', 1)
    for name in ('00001.png', '00002.png'):
        cv2.imwrite(
            str(data / 'annotations' / 'training' / name),
            np.full((64, 64), 99, np.uint8),
        )
    said = train(SEGMENTOR, data, workers=1)
    assert '[99]' in said and 'annotations/training/0000' in said


@pytest.mark.slow
def test_class_map_in_colour(data):
    path = data / 'annotations' / 'training' / '00000.png'
    cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8) + 200)
    said = train(SEGMENTOR, data)
    assert str(path) in said and 'one channel' in said


def test_ignored_label_of_one_side_only(data):
    said = train(SEGMENTOR, data, 'train_dataloader.dataset.ignore_index=17')
    assert 'decode_head.ignore_index is 255' in said and '=17' in said


def test_no_images_listed(data):
    path = data / 'annotations' / 'instances_training.json'
    edit_json(path, lambda c: c.update(images=[], annotations=[]))
    said = train(DETECTOR, data)
    assert str(path) in said and 'no images' in said


@pytest.mark.slow
def test_no_annotation_of_the_classes(data):
    path = data / 'annotations' / 'instances_training.json'

    def rename(content):
        for category in content['categories']:
            category['name'] += 's'

    edit_json(path, rename)
    said = train(
        DETECTOR, data, 'train_dataloader.dataset.filter_cfg.filter_empty_gt=True'
    )
    assert str(path) in said and 'circles' in said and 'spelled' in said


def test_empty_folder(data):
    for path in (data / 'images' / 'training').iterdir():
        path.rename(path.with_suffix('.JPG'))
    said = train(SEGMENTOR, data)
    assert 'images/training' in said and "img_suffix='.png'" in said
    assert '.JPG' in said


@pytest.mark.slow
@pytest.mark.parametrize(
    'content, reason',
    [
        ('{"images": [', 'not a JSON file'),
        ('[]', 'no lists'),
        ('{"images": [], "annotations": []}', "['categories']"),
    ],
)
def test_broken_annotation_file(content, reason, data):
    path = data / 'annotations' / 'instances_training.json'
    path.write_text(content)
    said = train(DETECTOR, data)
    assert str(path) in said and reason in said


def test_annotation_without_area(data):
    path = data / 'annotations' / 'instances_training.json'
    edit_json(path, lambda c: c['annotations'][1].pop('area'))
    said = train(DETECTOR, data)
    assert str(path) in said and "['area']" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda items: items[1].update(bbox=[1, 2, 3]), 'annotation 2 is [1, 2, 3]'),
        (lambda items: items[1].update(bbox=[1, 2, 3, '4']), "[1, 2, 3, '4']"),
        (lambda items: items[1].update(id=1), 'several annotations of the id 1'),
    ],
)
def test_annotations_that_end_the_reading(change, reason, data):
    path = data / 'annotations' / 'instances_training.json'
    edit_json(path, lambda c: change(c['annotations']))
    said = train(DETECTOR, data)
    assert str(path) in said and reason in said


@pytest.mark.slow
@pytest.mark.parametrize('split', ['training', 'validation'])
def test_annotations_without_masks(split, data):
    """The images are fine: what is said is about annotations and the config."""
    path = data / 'annotations' / f'instances_{split}.json'
    number = len(json.loads(path.read_text())['annotations'])

    def take_masks(content):
        for item in content['annotations']:
            del item['segmentation']

    edit_json(path, take_masks)
    said = train(DETECTOR, data)
    assert str(path) in said and '.png' not in said
    assert f'{number} of {number} annotations have no `segmentation`' in said
    assert 'Mask R-CNN' in said
    config = re.search(r'configs/custom/\S+\.py', said)[0]
    assert "type='FasterRCNN'" in Config.fromfile(ROOT / config).pretty_text


@pytest.mark.slow
def test_no_annotation_is_left(data):
    path = data / 'annotations' / 'instances_training.json'

    def to_shares(content):  # of the image's sides, as YOLO has them
        for item in content['annotations']:
            item['bbox'] = [number / 64 for number in item['bbox']]

    edit_json(path, to_shares)
    said = train(DETECTOR, data)
    assert str(path) in said and 'no annotation that can be used' in said
    assert 'below 1 pixel' in said


def test_evaluator_of_other_annotations(data):
    said = train(
        DETECTOR,
        data,
        'val_evaluator.ann_file='
        + str(data / 'annotations' / 'instances_training.json'),
    )
    assert 'val_evaluator.ann_file' in said and said.endswith('both the same file')
    lacking = f'{data}annotations/instances_validation.json'  # a slash
    said = train(DETECTOR, data, f'val_evaluator.ann_file={lacking}')
    assert 'data_root ends with a slash' in said


def test_evaluators_of_published_kinds_pass():
    cfg = Config(
        dict(
            val_dataloader=dict(
                dataset=dict(
                    type='CocoPanopticDataset', backend_args=dict(backend='s3')
                )
            ),
            val_evaluator=[
                dict(type='CocoPanopticMetric', ann_file='panoptic.json'),
                dict(type='CocoMetric', ann_file='instances.json'),
            ],
        )
    )
    check_data(cfg, ['val_dataloader'])


class Broken:
    """Module level, so that a worker can unpickle it."""

    def __call__(self, results):
        raise DataError("'a.png' cannot be read")


def test_message_of_a_worker_is_one_sentence():
    error = DataError(
        'Caught DataError in DataLoader worker process 0.\n'
        'Original Traceback (most recent call last):\n  ...\n'
        'convnext_mm.datasets.data_check.DataError: say this\n'
    )
    assert str(error) == 'say this'
    assert str(pickle.loads(pickle.dumps(error))) == 'say this'


def test_what_is_no_base_dataset_is_left_alone():
    check_dataset([1, 2, 3], nn.Identity())
    explain_failure(Config(dict(type='Own')))


def test_guard_shows_what_it_wraps():
    dataset = type('D', (), dict(metainfo={}, test_mode=True))()
    assert repr(GuardedLoad(len, dataset)) == repr(len)
