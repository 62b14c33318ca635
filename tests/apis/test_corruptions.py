"""``convnext-mm test --corruptions``, and what it does to images."""

import json
import shutil
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import loops as mmengine_loops
from mmengine.utils import ManagerMixin
from torch.utils.data import DataLoader, Dataset

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis import corruptions
from convnext_mm.apis.config import load_config
from convnext_mm.cli import main
from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.corruptions import NAMES, Corrupt
from convnext_mm.datasets.errors import DataError
from repo import ROOT, free_port, run

imagecorruptions = pytest.importorskip('imagecorruptions')
SEGMENTOR = 'configs/demo/upernet_convnext-atto_shapes.py'
DETECTOR = 'configs/demo/mask-rcnn_convnext-atto_shapes.py'
SHAPES = ((32, 32, 3), (33, 57, 3), (64, 33, 1), (300, 35), (35, 300, 3))


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """Smooth, as photos are, with an edge, in all colours."""
    rng = np.random.default_rng(seed)
    channels = shape[2:] or (1,)
    small = rng.integers(60, 200, (6, 5, *channels), dtype=np.uint8)
    image = cv2.resize(small, shape[1::-1], interpolation=cv2.INTER_CUBIC)
    image[: shape[0] // 2, : shape[1] // 3] //= 2
    return image.reshape(shape)


def corrupted(image, name, severity, path='x.png'):
    results = dict(img=image.copy(), img_path=path)
    return Corrupt(name, severity)(results)['img']


@pytest.mark.parametrize('name', NAMES)
def test_every_corruption(name):
    """Of every shape: the image changes, the same way each time, whatever NumPy has
    drawn before, and NumPy's generator does not notice."""
    for shape in SHAPES:
        image = picture(*shape)
        np.random.seed(1)
        before = np.random.get_state()
        for severity in (1, 5):
            found = corrupted(image, name, severity)
            assert found.shape == image.shape and found.dtype == image.dtype
            assert (found != image).any()
        after = np.random.get_state()
        assert before[0] == after[0] and (before[1] == after[1]).all()
        np.random.rand(7)
        assert (corrupted(image, name, 5) == found).all()
    as_float = corrupted(image.astype(np.float32), name, 5)
    assert as_float.dtype == np.float32 and (as_float == found).all()


@pytest.mark.parametrize('name', NAMES)
def test_more_with_severity(name):
    """All 15 change more pixels by more, on the average of some images."""

    def distance(severity):
        images = (picture(96, 128, 3, seed=seed) for seed in range(8))
        return np.mean(
            [np.abs(corrupted(i, name, severity).astype(float) - i) for i in images]
        )

    weak, strong = distance(1), distance(5)
    assert 0 < weak < strong


def test_nothing_is_the_clean_image():
    image = picture(8, 8, 3)
    assert (Corrupt()(dict(img=image))['img'] == image).all()


def test_random_draws_are_the_images_own():
    """Noise differs from image to image, severity to severity; not from a place to
    another."""
    plain = [np.full((64, 64, 3), value, np.uint8) for value in (100, 101)]
    noise = [corrupted(i, 'gaussian_noise', 1).astype(int) - i for i in plain]
    assert np.abs(noise[0] - noise[1]).mean() > 5
    again = corrupted(plain[0], 'gaussian_noise', 1, path='elsewhere/y.png')
    assert (again == noise[0] + 100).all()


@pytest.mark.parametrize('name', ['snow', 'frost', 'jpeg_compression'])
def test_colours_are_those_of_the_package(name, monkeypatch):
    """Images come as BGR, and the package wants RGB."""
    seeds = []
    seed = np.random.seed
    monkeypatch.setattr(np.random, 'seed', lambda s: seeds.append(s) or seed(s))
    image = picture(64, 96, 3)
    ours = corrupted(image, name, 3)
    seed(seeds[0])
    rgb = np.ascontiguousarray(image[..., ::-1])
    theirs = imagecorruptions.corrupt(rgb, severity=3, corruption_name=name)
    assert (ours == theirs[..., ::-1]).all()


class Pictures(Dataset):
    def __init__(self, name):
        self.corrupt = Corrupt(name, 3)

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, self.corrupt(dict(img=picture(40, 40, 3, seed=index)))['img']


@pytest.mark.parametrize('name', ['shot_noise', 'impulse_noise', 'glass_blur', 'frost'])
def test_workers_and_order_do_not_matter(name):
    found = []
    for workers, shuffle in ((0, False), (2, True)):
        loader = DataLoader(Pictures(name), 1, shuffle=shuffle, num_workers=workers)
        found.append({int(index): image for index, image in loader})
    assert all((found[0][index] == found[1][index]).all() for index in range(6))


@pytest.mark.parametrize(
    'image, reason',
    [
        (
            picture(32, 31, 3),
            r"'a/b.png' has 31 x 32 pixels.*fog needs at least 32 x 32",
        ),
        (picture(20, 400, 1), '400 x 20 pixels'),
        (picture(40, 40, 3).astype(np.uint16), 'loaded as uint16'),
        (np.zeros((40, 40, 4), np.uint8), r'shape \(40, 40, 4\)'),
        (np.full((40, 40, 3), 300.0), 'values of 0 to 255'),
        (np.full((40, 40, 3), np.nan), 'values of 0 to 255'),
    ],
)
def test_images_that_cannot_be_corrupted(image, reason):
    with pytest.raises(DataError, match=reason):
        corrupted(image, 'fog', 1, path='a/b.png')


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(DataError, match='pip install imagecorruptions-imaug'):
        Corrupt()


def test_means_and_quotients():
    known = {
        (None, 0): {'a': 0.5, 'b': -1.0, 'c': 0.0},
        ('fog', 1): {'a': 0.4, 'b': -1.0, 'c': 0.0},
        ('fog', 3): {'a': 0.2, 'b': -1.0, 'c': 0.0},
        ('snow', 1): {'a': 0.3, 'b': 0.3, 'c': 0.1},
        ('snow', 3): {'a': 0.1, 'b': 0.3, 'c': 0.1},
    }
    cells = corruptions.cells_of(['fog', 'snow'], [3, 1, 3])
    assert cells == list(known)[1:]
    found = corruptions.summarise(known, cells)
    assert found['mPC'] == pytest.approx(dict(a=0.25, c=0.05))
    assert found['rPC'] == pytest.approx(dict(a=0.5))
    assert len(corruptions.cells_of(['all'], range(1, 6))) == 75


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    """Drawn images, and weights of which the predictions are of no use."""
    folder = tmp_path_factory.mktemp('corruptions')
    write_shapes(folder / 'shapes', 1, 3, 64)
    for name, config in (('seg', SEGMENTOR), ('det', DETECTOR)):
        torch.manual_seed(0)
        model = build_model(load_config(str(ROOT / config)), 'cpu')
        torch.save(dict(state_dict=model.state_dict()), folder / f'{name}.pth')
    return folder


def forget():
    """MMEngine would give a run that starts in the same second the parts of the one
    before."""
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        vars(kind).get('_instance_dict', {}).clear()


@pytest.fixture
def call(drawn, tmp_path, monkeypatch):
    """Runs the command on the drawn images; gives what it leaves."""
    pytest.importorskip('mmseg')
    monkeypatch.chdir(tmp_path)

    def arguments(*words, config=SEGMENTOR, workers=0, weights=None):
        name = 'seg' if config == SEGMENTOR else 'det'
        return [
            'test',
            str(ROOT / config),
            str(weights or drawn / f'{name}.pth'),
            *('--data-root', str(drawn / 'shapes'), '--work-dir', str(tmp_path / 'w')),
            *map(str, words),
            '--cfg-options',
            f'test_dataloader.num_workers={workers}',
            f'test_dataloader.persistent_workers={workers > 0}',
            'test_dataloader.batch_size=2',
        ]

    def start(*words, **more):
        forget()
        assert main(arguments(*words, **more)) == 0
        return json.loads((tmp_path / 'w' / corruptions.RESULT).read_text())

    start.arguments = arguments
    return start


@pytest.fixture
def loops(monkeypatch):
    """Counts evaluations; ``ends_at`` one of them a run is killed."""
    original = mmengine_loops.TestLoop.run

    class Loops:
        count, ends_at = 0, None

    def counted(loop):
        Loops.count += 1
        if Loops.count == Loops.ends_at:
            raise KeyboardInterrupt
        return original(loop)

    monkeypatch.setattr(mmengine_loops.TestLoop, 'run', counted)
    return Loops


def cells(result):
    return {(c['corruption'], c['severity']): c['metrics'] for c in result['cells']}


TWO = ('--corruptions', 'impulse_noise', 'fog', '--severities', '1', '5')


@pytest.mark.slow
def test_a_run_that_is_cut_off(call, loops, tmp_path, capfd):
    """Goes on with the rest, and ends as one undisturbed; with workers or without."""
    whole = call(*TWO)
    assert loops.count == 5 and list(cells(whole)) == [
        (None, 0),
        *((name, s) for name in ('impulse_noise', 'fog') for s in (1, 5)),
    ]
    out = capfd.readouterr().out
    assert 'mIoU, by severity' in out and 'mPC' in out and 'rPC' in out
    summary = whole['summary']
    mean = np.mean([m['mIoU'] for cell, m in cells(whole).items() if cell[0]])
    assert summary['mPC']['mIoU'] == pytest.approx(mean)
    clean = cells(whole)[None, 0]['mIoU']
    assert summary['rPC']['mIoU'] == pytest.approx(mean / clean)
    assert len({json.dumps(metrics) for metrics in cells(whole).values()}) == 5
    (start,) = whole['starts']
    assert set(start) == {'command', 'machine', 'versions'}
    png = (tmp_path / 'w' / corruptions.PICTURE).read_bytes()
    assert png.startswith(b'\x89PNG')

    shutil.rmtree(tmp_path / 'w')
    loops.ends_at = loops.count + 3
    with pytest.raises(SystemExit):
        call(*TWO)
    loops.count, loops.ends_at = 0, None
    again = call(*TWO, workers=2)
    assert loops.count == 3
    assert cells(again) == cells(whole) and again['summary'] == summary
    # Nothing is left to do; then one severity of another corruption is.
    assert call(*TWO) == again and loops.count == 3 and len(again['starts']) == 2
    more = call('--corruptions', 'fog', 'contrast', '--severities', 5)
    assert loops.count == 4 and len(more['cells']) == 6
    assert more['summary']['corruptions'] == ['fog', 'contrast']
    assert more['summary']['severities'] == [5]


@pytest.mark.slow
def test_results_of_something_else(call, drawn, tmp_path, loops):
    one = ('--corruptions', 'contrast', '--severities', '2')
    before = call(*one)
    state = torch.load(drawn / 'seg.pth')
    state['state_dict']['decode_head.conv_seg.bias'] += 1
    torch.save(state, tmp_path / 'other.pth')
    loops.count = 0
    for more, reason in (
        (dict(weights=tmp_path / 'other.pth'), 'checkpoint_sha256 was'),
        (dict(config=DETECTOR), 'model.type was EncoderDecoder'),
    ):
        with pytest.raises(SystemExit, match=f'{reason}.*another folder with --work'):
            call(*one, **more)
    with pytest.raises(SystemExit, match='deploy was False and is True'):
        call(*one, '--deploy')
    file = tmp_path / 'w' / corruptions.RESULT
    assert json.loads(file.read_text()) == before and loops.count == 0
    file.write_text('{"cells": 1}')
    with pytest.raises(SystemExit, match='no result of --corruptions.*delete the file'):
        call(*one)


@pytest.mark.slow
def test_deployed_and_averaged(call, drawn, tmp_path):
    """--deploy changes figures by rounding alone; --tta averages over flips, and every
    one of them is of the corrupted image."""
    one = ('--corruptions', 'gaussian_noise', '--severities', '5')
    plain = cells(call(*one))
    shutil.rmtree(tmp_path / 'w')
    deployed = cells(call(*one, '--deploy'))
    for cell, metrics in plain.items():
        assert deployed[cell]['aAcc'] == pytest.approx(metrics['aAcc'], abs=0.5)
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    steps = [flips, [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]]
    found = []
    for folder, kind in (('flipped', flips), ('twice', flips[:1] * 2)):
        forget()
        steps[0] = kind
        summary = corruptions.test_corruptions(
            str(ROOT / SEGMENTOR),
            str(drawn / 'seg.pth'),
            corruptions=['gaussian_noise'],
            severities=[5],
            tta=True,
            work_dir=folder,
            data_root=str(drawn / 'shapes'),
            cfg_options={
                'tta_pipeline': [
                    dict(type='LoadImageFromFile'),
                    dict(type='TestTimeAug', transforms=steps),
                ],
                'test_dataloader.num_workers': 0,
                'test_dataloader.persistent_workers': False,
            },
        )
        found.append((summary['clean'], summary['mPC']))
    # An average over the same image twice is what one alone gives.
    clean, noisy = plain.values()
    assert found[1][0] == pytest.approx(clean, abs=0.1)
    assert found[1][1] == pytest.approx(noisy, abs=0.1)
    assert found[0][1] != pytest.approx(noisy, abs=0.1)


@pytest.mark.slow
def test_a_detector_that_finds_nothing(call, capfd):
    """Means of 0, no quotient, and nothing of sizes that no object has."""
    result = call('--corruptions', 'fog', '--severities', '1', config=DETECTOR)
    summary = result['summary']
    assert summary['mPC']['coco/bbox_mAP'] == pytest.approx(0, abs=0.01)
    assert summary['clean']['coco/bbox_mAP_l'] == -1
    assert 'coco/bbox_mAP_l' not in summary['mPC']
    out = capfd.readouterr().out
    assert 'box AP, by severity' in out and 'mask AP, by severity' in out


@pytest.mark.slow
def test_several_processes(call, tmp_path):
    """The sum of what they find, written once."""
    one = ('--corruptions', 'shot_noise', '--severities', '3')
    alone = call(*one)
    shutil.rmtree(tmp_path / 'w')
    command = call.arguments(*one, '--gpus', '2')
    run(sys.executable, '-m', 'convnext_mm', *command, port=free_port())
    both = json.loads((tmp_path / 'w' / corruptions.RESULT).read_text())
    assert cells(both).keys() == cells(alone).keys()
    for cell, metrics in cells(alone).items():
        assert cells(both)[cell] == pytest.approx(metrics)


def test_mistakes(call, drawn, tmp_path, capsys):
    for words, reason in (
        (['--corruptions', 'fogg'], "'fogg': did you mean fog?"),
        (['--corruptions', 'all', 'rain'], "no corruption 'rain'.*pixelate"),
        (['--corruptions', 'fog', '--severities', '0'], 'from 1 to 5, got 0'),
        (['--corruptions', 'fog', '--severities', '6'], 'from 1 to 5, got 6'),
        (['--severities', '1'], '--severities is of --corruptions'),
        (['--corruptions', 'fog', '--out', 'x.pkl'], '--out is for one evaluation'),
        (['--corruptions', 'fog', '--show'], '--show is for one evaluation'),
        (['--corruptions', 'fog', '--show-dir', 'd'], '--show-dir is for one'),
    ):
        with pytest.raises(SystemExit, match=reason):
            main(call.arguments(*words))
    with pytest.raises(SystemExit, match='2'):
        main(call.arguments('--corruptions', 'fog', '--severities', 'x'))
    assert "'x' is not a valid integer" in capsys.readouterr().err
    assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_images_that_are_too_small(drawn, call, tmp_path):
    data = shutil.copytree(drawn / 'shapes', tmp_path / 'small')
    path = sorted((data / 'images' / 'validation').iterdir())[1]
    cv2.imwrite(str(path), picture(31, 40, 3))
    command = call.arguments('--corruptions', 'fog', config=DETECTOR)
    command[command.index('--data-root') + 1] = str(data)
    with pytest.raises(SystemExit, match=f'{path.name}.* has 40 x 31 pixels'):
        main(command)


@pytest.mark.slow
def test_pipelines_that_cannot_be_corrupted(call, tmp_path, monkeypatch):
    pytest.importorskip('mmpretrain')
    folder = tmp_path / 'c' / 'fog' / '1' / 'n01440764'
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / '0.JPEG'), picture(64, 64, 3))
    name = 'convnext-tiny_imagenet-c'
    small = {'model.backbone.arch': 'atto', 'model.head.in_channels': 320}
    cfg = load_config(name, cfg_options=small)
    state = build_model(cfg, 'cpu').state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'c.pth')
    with pytest.raises(SystemExit, match='are corrupted already'):
        main(
            [
                *('test', name, 'c.pth', '--data-root', 'c', '--corruptions', 'fog'),
                '--cfg-options',
                *(f'{key}={value}' for key, value in small.items()),
                'test_dataloader.num_workers=0',
                'test_dataloader.dataset.classes=[n01440764]',
                'test_dataloader.dataset.corruptions=[fog]',
                'test_dataloader.dataset.severities=[1]',
            ]
        )
