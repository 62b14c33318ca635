"""Training does without a few images that are gone or broken, the same ones each
time, and stops at one more."""

import logging
import traceback

import pytest
from mmengine.dataset import ConcatDataset
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader

from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.data_check import DataError, check_dataset

NUMBER = 12
GONE, BROKEN = 3, 5


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of twelve images one is gone and one broken, neither of which is loaded
    before training starts."""
    write_shapes(tmp_path, num_train=NUMBER, num_val=1, size=64)
    image(tmp_path, GONE).unlink()
    image(tmp_path, BROKEN).write_bytes(b'no image')
    monkeypatch.setattr('convnext_mm.datasets.data_check.NUM_SAMPLES', 1)
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    lines = []

    def note(message, logger=None, level=logging.INFO):
        assert (logger, level) == ('current', logging.WARNING)
        lines.append(message)

    monkeypatch.setattr('convnext_mm.datasets.skip_unreadable.print_log', note)
    return lines


def image(folder, number):
    return folder / 'images' / 'training' / f'{number:05d}.png'


def build(folder, **more):
    return DATASETS.build(
        dict(
            type='mmdet.CocoDataset',
            serialize_data=False,
            data_root=str(folder),
            metainfo=dict(classes=('circle', 'triangle', 'square', 'star', 'cross')),
            ann_file='annotations/instances_training.json',
            data_prefix=dict(img='images/training/'),
            pipeline=[dict(type='mmdet.LoadImageFromFile')],
            **more,
        )
    )


def ids(dataset, workers=0):
    """The images of an epoch, in order."""
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=list)
    return [sample['img_id'] for batch in loader for sample in batch]


def test_others_take_their_place(folder, said):
    dataset, listing = build(folder), folder / 'unreadable.txt'
    check_dataset(dataset, max_unreadable=2, listing=listing)
    assert len(said) == 1 and f'{image(folder, GONE)}' in said[0]
    assert 'does not exist' in said[0] and '1 of max_unreadable_images=2' in said[0]
    seen = ids(dataset)
    assert len(seen) == NUMBER
    replaced = [i for i in range(NUMBER) if seen[i] != i]
    assert replaced == [GONE, BROKEN] and not {GONE, BROKEN} & {*seen}
    assert len(said) == 2 and f'{image(folder, BROKEN)}' in said[1]
    assert 'cannot be read' in said[1] and '2 of max_unreadable_images=2' in said[1]
    assert ids(dataset) == seen  # the next epoch, which counts none again
    assert len(said) == 2
    lines = listing.read_text().splitlines()
    assert len(lines) == 2 and str(image(folder, BROKEN)) in lines[1]


def test_workers_replace_by_the_same_and_count_together(folder):
    plain = build(folder)
    check_dataset(plain, max_unreadable=2)
    dataset, listing = build(folder), folder / 'unreadable.txt'
    check_dataset(dataset, max_unreadable=2, listing=listing)
    assert ids(dataset, workers=2) == ids(plain)
    # What workers met is known here and to the workers of the next epoch.
    assert [*dataset.prepare_data.known] == [*plain.prepare_data.known]
    assert len({*listing.read_text().splitlines()}) == 2
    image(folder, 8).write_bytes(b'')
    with pytest.raises(DataError) as caught:
        ids(dataset, workers=1)
    traceback.clear_frames(caught.tb)  # ends the worker
    message = str(caught.value)
    assert str(image(folder, 8)) in message and 'Traceback' not in message
    assert '3 files cannot be read, and max_unreadable_images is 2' in message


def test_one_more_stops_with_the_file_named(folder, said):
    dataset = build(folder)
    check_dataset(dataset, max_unreadable=1)
    with pytest.raises(DataError, match=rf'{image(folder, BROKEN)}.*2 files.* is 1'):
        ids(dataset)
    image(folder, 7).unlink()
    image(folder, 8).unlink()
    with pytest.raises(DataError, match='3 files of 12 .*max_unreadable_images=N'):
        check_dataset(build(folder), max_unreadable=2)


@pytest.mark.parametrize('is_gone', [False, True])
def test_what_is_met_before_training_counts_once(is_gone, folder, said):
    if is_gone:
        image(folder, 0).unlink()
    else:
        image(folder, 0).write_bytes(b'')
    check_dataset(build(folder), max_unreadable=2)
    assert len(said) == 2 and sum(str(image(folder, 0)) in line for line in said) == 1


def test_none_are_skipped_without_being_asked(folder):
    with pytest.raises(DataError, match=rf"{image(folder, GONE)}'.*_images=N"):
        check_dataset(build(folder))
    image(folder, GONE).write_bytes(b'no image')
    dataset = build(folder)
    check_dataset(dataset)
    with pytest.raises(DataError, match=rf'{image(folder, GONE)}.*replace it'):
        ids(dataset)


def test_evaluations_see_every_image(folder):
    with pytest.raises(DataError) as caught:
        check_dataset(build(folder, test_mode=True), max_unreadable=9)
    assert 'missing' in str(caught.value) and 'unreadable' not in str(caught.value)


def test_data_sets_of_a_loader_share_the_count(folder, said):
    both = ConcatDataset([build(folder), build(folder)])
    check_dataset(both, max_unreadable=3)
    with pytest.raises(DataError, match='4 files cannot be read'):
        ids(both)
    both = ConcatDataset([build(folder), build(folder)])
    check_dataset(both, max_unreadable=4)
    assert len(ids(both)) == 2 * NUMBER


def test_annotations_are_not_skipped(folder):
    dataset = build(folder)
    dataset.pipeline.transforms.append(LoadNothing())
    with pytest.raises(DataError, match='the annotation of'):
        check_dataset(dataset, max_unreadable=9)


class LoadNothing:
    def __call__(self, results):
        return results['nothing']


def test_nothing_but_unreadable_images_ends(folder):
    for number in range(NUMBER):
        image(folder, number).write_bytes(b'')
    dataset = build(folder)
    check_dataset(dataset, max_unreadable=NUMBER)
    with pytest.raises(DataError, match=f'none of {NUMBER} images'):
        ids(dataset)


@pytest.mark.parametrize('value', [-1, 1.5, '2', True, None])
def test_limits_are_numbers(folder, value):
    with pytest.raises(DataError, match='max_unreadable_images is a number'):
        check_dataset(build(folder), max_unreadable=value)


def test_images_and_class_maps_of_a_segmentor(folder, said):
    (folder / 'annotations' / 'training' / f'{7:05d}.png').write_bytes(b'')
    config = dict(
        type='mmseg.BaseSegDataset',
        serialize_data=False,
        data_root=str(folder),
        metainfo=dict(
            classes=('none', 'circle', 'triangle', 'square', 'star', 'cross')
        ),
        img_suffix='.png',
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        pipeline=[
            dict(type='mmseg.LoadImageFromFile'),
            dict(type='mmseg.LoadAnnotations'),
        ],
    )
    with pytest.raises(DataError, match='1 class maps have no image'):
        check_dataset(DATASETS.build(config))
    dataset = DATASETS.build(config)
    check_dataset(dataset, max_unreadable=2)
    paths = [dataset[index]['img_path'] for index in range(len(dataset))]
    assert len(paths) == NUMBER - 1 and str(image(folder, BROKEN)) not in paths
    assert len(said) == 2 and 'annotations/training/00007.png' in said[1]
