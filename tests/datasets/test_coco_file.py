"""Annotations that cannot be used are listed when a data set is built, left out
when it is loaded, and hide nothing else."""

import copy
import json
import logging

import numpy as np
import pytest
from mmengine.registry import DATASETS

from convnext_mm.datasets import coco_file
from convnext_mm.datasets.coco_file import CocoFile, reading_once, usable_mask
from convnext_mm.datasets.data_check import DataError, check_dataset

CLASSES = ('circle', 'triangle', 'square', 'star', 'cross')
NAN, INF = float('nan'), float('inf')


@pytest.fixture
def said(monkeypatch):
    """What is logged, as (level, message)."""
    lines = []

    def note(message, logger=None, level=logging.INFO):
        lines.append((level, message))

    monkeypatch.setattr('convnext_mm.datasets.coco_file.print_log', note)
    return lines


def build(data, change=lambda content: None, with_mask=True, split='training', **more):
    """The data set of a changed annotation file, checked."""
    path = data / 'annotations' / f'instances_{split}.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    dataset = DATASETS.build(
        dict(
            type='mmdet.CocoDataset',
            serialize_data=False,  # or it collects garbage, which takes longest
            data_root=str(data),
            metainfo=dict(classes=CLASSES),
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'images/{split}/'),
            pipeline=[
                dict(type='mmdet.LoadImageFromFile'),
                dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=with_mask),
            ],
            **more,
        )
    )
    check_dataset(dataset)
    return dataset


def loaded(dataset):
    """Numbers of boxes that it loads, and of those whose region is ignored."""
    boxes = ignored = 0
    for index in range(len(dataset)):
        results = dataset.prepare_data(index)
        corners = results['gt_bboxes'].numpy()
        assert np.isfinite(corners).all() and np.abs(corners).max(initial=0) < 200
        assert len(results.get('gt_masks', corners)) == len(corners)
        boxes += len(corners)
        ignored += int(results['gt_ignore_flags'].sum())
    return boxes, ignored


def number_of(content):
    return len(content['annotations'])


def test_good_annotations_are_passed_over(data, said):
    dataset = build(data)
    content = json.loads((data / 'annotations/instances_training.json').read_text())
    assert loaded(dataset) == (number_of(content), 0)
    assert said == []


@pytest.mark.parametrize(
    'change, kind',
    [
        (dict(bbox=[1, 1, 0, 5]), 'with a width or height below 1 pixel'),
        (dict(bbox=[9, 9, 5, -3]), 'with a width or height below 1 pixel'),
        (dict(bbox=[1, 1, NAN, 5]), 'whose bbox is not finite'),
        (dict(bbox=[1, 1, INF, 5]), 'whose bbox is not finite'),
        (dict(bbox=[-INF, 1, INF, 5]), 'whose bbox is not finite'),
        (dict(bbox=[1, 1, 1e30, 5]), 'whose bbox is outside of the image'),
        (dict(bbox=[-1e30, 1, 1e30, 5]), 'whose bbox is outside of the image'),
        (dict(bbox=[70, 1, 5, 5]), 'whose bbox is outside of the image'),
        (dict(area=0), 'with an area of 0 or less'),
        (dict(category_id=99), 'of a category_id that no category has, [99]'),
        (dict(image_id=99), 'of an image_id that no image has'),
    ],
)
@pytest.mark.parametrize('with_mask', [False, True])
def test_faulty_boxes_are_listed_and_left_out(change, kind, with_mask, data, said):
    numbers = []

    def spoil(content):
        for item in content['annotations'][:4]:
            item.update(change)
        numbers.append(number_of(content))

    dataset = build(data, spoil, with_mask)
    ((level, message),) = said
    assert level == logging.WARNING
    assert str(data / 'annotations/instances_training.json') in message
    assert f'4 of {numbers[0]} annotations' in message and f': 4 {kind}' in message
    where = 'image 99' if 'image_id' in change else "'00000.png'"
    assert f'(id 1 of {where}, id 2 of' in message and ', ...)' in message
    said.clear()
    assert loaded(dataset) == (numbers[0] - 4, 0)
    assert said == []


def test_kinds_are_counted_apart_and_once_each(data, said):
    def spoil(content):
        first, second, third, *_ = content['annotations']
        first.update(bbox=[1, 1, -1, 5], area=0)  # two faults, counted once
        second.update(bbox=[NAN] * 4)
        third.update(area=-1, segmentation=None)

    build(data, spoil)
    ((_, message),) = said
    assert '3 of ' in message
    for kind in ('1 with a width or height', '1 whose bbox is not', '1 with an area'):
        assert kind in message
    assert 'without segmentation' not in message


BAD_MASKS = [
    (None, 'without segmentation'),
    ([], 'without segmentation'),
    ([[1, 2, 3, 4]], 'fewer than 3 points'),
    ([1, 2, 3, 4, 5, 6], 'fewer than 3 points'),  # not a list of polygons
    ([[1, 2, 3, 4, 5, '6']], 'fewer than 3 points'),
    ([[1e12, 0, 0, 1e12, 5, 5]], 'far outside of the image'),
    ([[5, 5, NAN, 9, 9, 5]], 'far outside of the image'),
    (dict(size=[5, 5], counts=[25]), 'another size'),
    (dict(size=[64, 64], counts=[25, 99999]), 'another size'),
    (dict(size=[64, 64]), 'another size'),
    (dict(size=64, counts='a'), 'another size'),
    (dict(size=[64, 64], counts=[[64, 64]]), 'another size'),
]


@pytest.mark.parametrize('mask, kind', BAD_MASKS)
def test_faulty_masks_are_listed_and_their_regions_ignored(mask, kind, data, said):
    numbers = []

    def spoil(content):
        content['annotations'][0]['segmentation'] = mask
        numbers.append(number_of(content))

    dataset = build(data, spoil)
    ((level, message),) = said
    assert level == logging.WARNING
    assert f'1 of {numbers[0]} annotations' in message and kind in message
    assert "id 1 of '00000.png'" in message
    assert loaded(dataset) == (numbers[0], 1)


@pytest.mark.parametrize('mask, kind', BAD_MASKS)
def test_masks_do_not_matter_to_boxes(mask, kind, data, said):
    dataset = build(
        data, lambda c: c['annotations'][0].update(segmentation=mask), with_mask=False
    )
    assert said == [] and loaded(dataset)[1] == 0


@pytest.mark.parametrize('mask, kind', BAD_MASKS)
def test_masks_that_a_metric_fails_on_stop_at_once(mask, kind, data, said):
    with pytest.raises(DataError, match=f'cannot be evaluated.*{kind}.*id 1 of'):
        build(
            data,
            lambda c: c['annotations'][0].update(segmentation=mask),
            split='validation',
            test_mode=True,
        )


def test_one_bad_polygon_of_several_goes_alone(data, said):
    def spoil(content):
        content['annotations'][0]['segmentation'].append([1, 2, 3, 4])

    dataset = build(data, spoil)
    assert loaded(dataset)[1] == 0
    build(data, spoil, split='validation', test_mode=True)
    assert [level for level, _ in said] == [logging.WARNING] * 2
    assert all('1 of whose polygons one does' in message for _, message in said)


def test_run_length_encodings_of_the_image_are_used(data, said):
    counts = [64 * 8, 64 * 4, 64 * 52]
    dataset = build(
        data,
        lambda c: c['annotations'][0].update(
            segmentation=dict(size=[64, 64], counts=counts)
        ),
    )
    assert said == []
    assert dataset.prepare_data(0)['gt_masks'].masks[0].sum() == 64 * 4
    assert usable_mask(dict(size=[64, 64], counts='a'), 64, 64)  # compressed


def to_corners(content):
    for item in content['annotations']:
        x, y, width, height = item['bbox']
        item['bbox'] = [x, y, x + width, y + height]


def test_boxes_that_are_corners_are_suspected(data, said):
    build(data, to_corners)
    warnings = [message for level, message in said if 'x1, y1, x2, y2' in message]
    assert len(warnings) == 1
    assert '100% would fit' in warnings[0] and 'x, y, width, height' in warnings[0]


def test_real_boxes_and_cut_off_ones_are_not_suspected(shared_dir, said):
    for split in ('train', 'val'):
        path = shared_dir / f'data/coco_tiny/annotations/instances_{split}2017.json'
        content = json.loads(path.read_text())
        file = CocoFile(str(path), content)
        file.check_annotations(True, False)
        file.check_corners()
        # As far beyond the image as within, as where hidden parts are annotated.
        wide = copy.deepcopy(content)
        for item in wide['annotations']:
            item['bbox'][2] *= 2
        CocoFile(str(path), wide).check_corners()
        assert said == []
        to_corners(content)
        CocoFile(str(path), content).check_corners()
        assert len(said) == 1
        said.clear()


def test_images_that_are_left_out_are_counted(data, said):
    def spoil(content):
        first, second, _ = content['images']
        first['width'] = 20
        content['annotations'] = [
            item for item in content['annotations'] if item['image_id'] != second['id']
        ]

    filter_cfg = dict(filter_empty_gt=True, min_size=32)
    dataset = build(data, spoil, filter_cfg=filter_cfg)
    assert len(dataset) == 1
    (message,) = [message for _, message in said if 'images are left out' in message]
    assert '2 of 3 images' in message and '1 without a box' in message
    assert '1 with a side below 32' in message and 'filter_empty_gt' in message
    said.clear()
    build(data)
    assert not [message for _, message in said if 'images are left out' in message]


def test_file_is_read_once(data, monkeypatch):
    from pycocotools.coco import COCO

    reads, original, load = [], COCO.__init__, json.load

    def counting(file):
        reads.append(file.name)
        return load(file)

    monkeypatch.setattr(json, 'load', counting)
    with reading_once():
        build(data, lambda content: content['annotations'][0].update(area=0))
        assert coco_file._kept == {}
    assert len(reads) == 1
    assert COCO.__init__ is original
    build(data)
    assert len(reads) == 3


def test_what_is_kept_goes_with_the_reading(data):
    from mmdet.datasets.api_wrappers import COCO

    path = str(data / 'annotations' / 'instances_training.json')
    with pytest.raises(RuntimeError, match='elsewhere'), reading_once():
        COCO(path)
        assert path in coco_file._kept
        raise RuntimeError('elsewhere')
    assert coco_file._kept == {}
