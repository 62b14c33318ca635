"""The drawn data set: what it holds, and that its two layouts agree."""

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from convnext_mm.datasets import CLASSES, draw_scene, write_shapes


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes')
    write_shapes(path, num_train=20, num_val=6, size=128)
    return path


def test_same_seed_same_files(shapes, tmp_path):
    write_shapes(tmp_path, num_train=2, num_val=6, size=128)
    for name in (
        'images/training/00001.png',
        'images/validation/00005.png',
        'annotations/training/00000.png',
        'annotations/instances_validation.json',
    ):
        assert (shapes / name).read_bytes() == (tmp_path / name).read_bytes()


def test_splits_differ(shapes):
    a, b = (
        cv2.imread(str(shapes / f'images/{split}/00000.png'))
        for split in ('training', 'validation')
    )
    assert a.shape == (128, 128, 3) and (a != b).mean() > 0.5


def test_polygons_boxes_and_class_maps_agree(shapes):
    coco = COCO(shapes / 'annotations/instances_training.json')
    assert [c['name'] for c in coco.cats.values()] == list(CLASSES)
    seen = set()
    for image_id, image in coco.imgs.items():
        class_map = cv2.imread(
            str(shapes / 'annotations/training' / image['file_name']),
            cv2.IMREAD_UNCHANGED,
        )
        drawn = np.zeros_like(class_map)
        for ann in coco.imgToAnns[image_id]:
            mask = coco.annToMask(ann).astype(bool)
            assert ann['area'] == mask.sum()
            x, y, w, h = ann['bbox']
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)
            drawn[mask] = ann['category_id']
            seen.add(ann['category_id'])
        assert (drawn == class_map).all()
    assert seen == set(range(1, len(CLASSES) + 1))


def test_sizes_and_overlaps():
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, 192) for _ in range(60)]
    areas = np.concatenate([[m.sum() for m in s.masks] for s in scenes])
    assert areas.min() < 16**2 and areas.max() > 64**2
    touching = 0
    for scene in scenes:
        total = sum(m.astype(int) for m in scene.masks)
        assert total.max() == 1  # a pixel belongs to one shape
        grown = sum(
            cv2.dilate(m.astype(np.uint8), np.ones((5, 5))) for m in scene.masks
        )
        touching += grown.max() > 1
    assert touching > 10


@pytest.mark.parametrize(
    'settings', [dict(num_train=0), dict(num_val=0), dict(size=32)]
)
def test_bad_settings(tmp_path, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f'{name} must be at least.*{value}'):
        write_shapes(tmp_path, **settings)
