"""From pictures to objects and masks: every kind of input, and what is written."""

import contextlib
import csv
import errno
import http.server
import io
import json
import os
import re
import shutil
import struct
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import convnext_mm
from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis.inference import infer, outputs
from convnext_mm.apis.inference.decode import decode
from convnext_mm.apis.inference.predictor import Predictor
from convnext_mm.cli import main
from convnext_mm.datasets import write_shapes
from convnext_mm.datasets.errors import DataError
from convnext_mm.engine.errors import ConfigError
from repo import ROOT, SHAPES

SEGMENTOR = 'configs/demo/upernet_convnext-atto_shapes.py'
SIZE = (64, 48)


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> dict[str, str]:
    """Files of untrained models."""
    folder = tmp_path_factory.mktemp('weights')
    files = {}
    for config in (SHAPES, SEGMENTOR):
        torch.manual_seed(0)
        state = build_model(Config.fromfile(ROOT / config), 'cpu').state_dict()
        files[config] = str(folder / f'{Path(config).stem}.pth')
        torch.save(dict(state_dict=state), files[config])
    return files


@pytest.fixture(scope='module')
def detector(weights) -> Predictor:
    return Predictor(str(ROOT / SHAPES), weights[SHAPES], 'cpu')


@pytest.fixture(scope='module')
def segmentor(weights) -> Predictor:
    return Predictor(str(ROOT / SEGMENTOR), weights[SEGMENTOR], 'cpu')


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def picture(mode: str = 'RGB', size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(noise(size[1], size[0], 3)).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(*shape: int) -> bytes:
    wide = noise(*shape).astype(np.uint16) * 257
    return cv2.imencode('.png', wide)[1].tobytes()


def png_that_says(width: int, height: int) -> bytes:
    """A header, and where its data would begin."""
    head = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    crc = struct.pack('>I', zlib.crc32(head))
    data = struct.pack('>I', 9) + b'IDAT'
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + head + crc + data


def turned(kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), kind, exif=exif)


def see_through() -> Image.Image:
    image = picture('RGBA')
    image.putalpha(0)
    return image


FRAMES = [Image.new('RGB', SIZE, colour) for colour in ('red', 'green', 'blue')]
# What is used, and what is said of it.
USED = {
    'jpeg': (encoded(picture(), 'JPEG'), None),
    'png': (encoded(picture(), 'PNG'), None),
    'bmp': (encoded(picture(), 'BMP'), None),
    'webp': (encoded(picture(), 'WEBP'), None),
    'ppm': (encoded(picture(), 'PPM'), None),
    'grey': (encoded(picture('L'), 'JPEG'), None),
    'one bit': (encoded(picture('1'), 'PNG'), None),
    'palette': (encoded(picture('P'), 'PNG'), None),
    'progressive': (encoded(picture(), 'JPEG', progressive=True), None),
    '16 bits, grey': (png_of_16_bits(48, 64), '16 bits were cut to 8'),
    '16 bits, colour': (png_of_16_bits(48, 64, 3), None),
    'CMYK': (encoded(picture('CMYK'), 'JPEG'), 'CMYK was converted'),
    'alpha': (encoded(picture('RGBA'), 'PNG'), 'transparent is white'),
    'grey and alpha': (encoded(picture('LA'), 'PNG'), 'transparent is white'),
    'palette, transparent': (
        encoded(picture('P'), 'PNG', transparency=0),
        'transparent is white',
    ),
    'animated gif': (
        encoded(FRAMES[0], 'GIF', save_all=True, append_images=FRAMES[1:], duration=9),
        'of 3 frames or pages the first',
    ),
    'animated webp': (
        encoded(see_through(), 'WEBP', save_all=True, append_images=FRAMES[1:]),
        'frames or pages the first',
    ),
    'pages': (
        encoded(FRAMES[0], 'TIFF', save_all=True, append_images=FRAMES[1:]),
        'of 3 frames or pages the first',
    ),
    '1 x 1': (encoded(picture(size=(1, 1)), 'PNG'), None),
    'a line': (encoded(picture(size=(64, 1)), 'PNG'), None),
}
REFUSED = {
    'text': (b'this is no picture', 'is no picture, but text'),
    'empty': (b'', 'is empty'),
    'cut jpeg': (encoded(picture(), 'JPEG')[:-900], 'damaged or cut off'),
    'cut png': (encoded(picture(), 'PNG')[:-900], 'damaged or cut off'),
    'cut header': (encoded(picture(), 'PNG')[:20], 'damaged or cut off|no picture'),
    'flipped': (
        encoded(picture(), 'PNG')[:99] + b'\xff' * 99 + encoded(picture(), 'PNG')[198:],
        'damaged or cut off',
    ),
    'large': (png_that_says(23_000, 22_000), '500 megapixels'),
    'bomb': (png_that_says(1 << 30, 1 << 30), 'megapixels'),
    'thin': (encoded(picture(size=(900, 1)), 'PNG'), 'more than 100 times the other'),
    'float': (encoded(picture('F'), 'TIFF'), 'save it with 8 bits'),
    '32 bits': (encoded(picture('I'), 'TIFF'), 'save it with 8 bits'),
    'pdf': (b'%PDF-1.7 ...', 'a PDF: save its pages'),
    'svg': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'an SVG drawing'),
    'page': (b'<!DOCTYPE html><html></html>', 'a web page: the address of the'),
    'lfs': (b'version https://git-lfs.github.com/spec/v1\n', 'run `git lfs pull`'),
    'heic': (b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', "'heic': save it as JPEG"),
}


@pytest.mark.parametrize('kind', USED)
def test_pictures_that_are_used(kind, detector, tmp_path):
    data, note = USED[kind]
    path = tmp_path / 'picture.jpg'  # what is in it counts
    path.write_bytes(data)
    image, found = decode(data, 'x')
    assert image.dtype == np.uint8 and image.shape[2] == 3
    result = infer(detector, str(path), tmp_path / 'out', score=0, progress=False)
    assert result.pictures == 1 and not result.failures
    assert result[0].size == image.shape[1::-1]
    assert (tmp_path / 'out/pictures/picture.jpg').is_file()
    if note is None:
        assert not result.notes and found is None
    else:
        ((said, count),) = result.notes.items()
        assert count == 1 and re.search(note, said)
        assert result.noted == {said: str(path)}


@pytest.mark.parametrize('kind', REFUSED)
def test_pictures_that_are_refused(kind, detector, tmp_path):
    data, reason = REFUSED[kind]
    (tmp_path / 'bad.jpg').write_bytes(data)
    (tmp_path / 'good.jpg').write_bytes(USED['jpeg'][0])
    with pytest.raises(DataError, match=reason):
        decode(data, 'x')
    with pytest.raises(DataError, match='no picture could be used: .*bad.jpg'):
        infer(detector, str(tmp_path / 'bad.jpg'), progress=False)
    result = infer(detector, str(tmp_path), progress=False)
    (failure,) = result.failures
    assert result.pictures == 1 and 'bad.jpg' in failure and '\n' not in failure


def test_pixels_are_those_of_training():
    """OpenCV's, where OpenCV and the training pipelines agree."""
    for kind in ('jpeg', 'png', 'grey', 'progressive', '16 bits, colour'):
        data = USED[kind][0]
        expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(decode(data, 'x')[0], expected)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
def test_turned(kind):
    assert decode(turned(kind), 'x')[0].shape == (64, 48, 3)


def test_transparent():
    white, _ = decode(encoded(see_through(), 'PNG'), 'x')
    assert (white == 255).all()


@pytest.mark.slow
def test_large_pictures(weights, segmentor, tmp_path):
    """Found in the shrunk picture, given in the pixels of the whole one."""
    path = tmp_path / 'large.png'
    cv2.imwrite(str(path), np.zeros((9000, 12000, 3), np.uint8))
    few = {'model.test_cfg.rcnn.max_per_img': 2}
    detector = Predictor(str(ROOT / SHAPES), weights[SHAPES], 'cpu', cfg_options=few)
    for predictor, megapixels in ((detector, 16), (segmentor, 4)):
        result = infer(predictor, path, score=0, progress=False)
        note = f'more than {megapixels} megapixels: shrunk for the model'
        assert result.notes == {note: 1}
        (found,) = result
        assert found.size == (12000, 9000)
        if found.class_map is not None:
            assert found.class_map.shape == (9000, 12000)
        else:
            assert found.boxes[:, 2].max() > 6000
            assert found.masks[0]['size'] == [9000, 12000]


def test_folders_patterns_and_names(detector, tmp_path):
    for name in ('a/x.jpg', 'b/x.JPG', 'b/c/x.png', 'b/.hidden.jpg', 'b/notes.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(USED['jpeg'][0])
    sources = [tmp_path / 'a/x.jpg', tmp_path / 'b']
    out = tmp_path / 'b/out'  # below a source: not read in the second run
    for _ in range(2):
        result = infer(detector, sources, out, progress=False)
        assert [found.name for found in result] == ['x', 'c/x', 'x_2']
    written = {str(p.relative_to(out / 'pictures')) for p in out.rglob('*.[jp]*g')}
    assert written == {'x.jpg', 'x_2.jpg', 'c/x.png'}
    assert not list(out.rglob('*.tmp'))
    result = infer(detector, str(tmp_path / 'a' / '**/*.jpg'), progress=False)
    assert len(result) == 1
    # Each file once, whatever names it.
    sources = [tmp_path / 'a', tmp_path / 'a/x.jpg', tmp_path / 'b/../a/*.jpg']
    assert len(infer(detector, sources, progress=False)) == 1


def test_pictures_of_one_name_in_the_ground_truth(detector, tmp_path):
    """By the end of the path; what the file lacks gets a number of its own."""
    for name in ('x/1.jpg', 'y/1.jpg', 'y/new.jpg'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(USED['jpeg'][0])
    images = [dict(id=i, file_name=n, width=64, height=48) for i, n in PAIRS]
    categories = [dict(id=7, name='circle')]
    truth = dict(images=images, annotations=[], categories=categories)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    out = tmp_path / 'out'
    result = infer(
        detector,
        [tmp_path / 'x', tmp_path / 'y'],
        out,
        score=0,
        ground_truth=str(path),
        progress=False,
    )
    found = json.loads((out / 'predictions.json').read_text())
    assert [image['id'] for image in found['images']] == [3, 5, 6]
    assert not result.failures
    names = {c['name']: c['id'] for c in found['categories']}
    assert names['circle'] == 7 and min(names.values()) == 7 and len(names) == 5
    bad = dict(id=1, image_id=3, category_id=7, bbox=[1, 2])
    path.write_text(json.dumps({**truth, 'annotations': [bad]}))
    result = infer(detector, tmp_path / 'x', ground_truth=str(path), progress=False)
    assert 'annotation 1 of the ground truth cannot be read' in result.failures[0]
    path.write_text(json.dumps({**truth, 'images': images[:1]}))
    sources = [tmp_path / 'x', tmp_path / 'y']
    result = infer(detector, sources, ground_truth=str(path), progress=False)
    assert 'is called in the ground truth as' in result.failures[0]
    images[1]['file_name'] = 'z/x/1.jpg'
    path.write_text(json.dumps(truth))
    result = infer(detector, tmp_path / 'x', ground_truth=str(path), progress=False)
    assert '2 files of the ground truth are called so' in result.failures[0]


PAIRS = [(3, 'x/1.jpg'), (5, 'y/1.jpg')]


def test_names_that_are_no_text(detector, tmp_path):
    path = os.fsencode(tmp_path) + b'/caf\xe9.jpg'
    Path(os.fsdecode(path)).write_bytes(USED['jpeg'][0])
    infer(detector, tmp_path, tmp_path / 'out', score=0, progress=False)
    assert b'caf\xe9.jpg' in (tmp_path / 'out/predictions.csv').read_bytes()


def test_a_video_and_pictures_of_its_name(segmentor, tmp_path):
    video(tmp_path / 'clip.avi', 2)
    (tmp_path / 'clip').mkdir()
    (tmp_path / 'clip/000000.png').write_bytes(USED['png'][0])
    infer(segmentor, tmp_path, tmp_path / 'out', progress=False)
    assert len(list((tmp_path / 'out/maps').rglob('*.png'))) == 3


def test_hidden_and_linked_folders(detector, tmp_path):
    for name in ('a/.thumbs/x.jpg', 'a/.x.jpg', 'b/y.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(USED['jpeg'][0])
    (tmp_path / 'a/link').symlink_to(tmp_path / 'b')
    (tmp_path / 'a/round').symlink_to(tmp_path / 'a')
    result = infer(detector, tmp_path / 'a', tmp_path / 'a', progress=False)
    assert [found.name for found in result] == ['link/y']


def test_names_that_no_disk_takes(detector, tmp_path, monkeypatch):
    """Nor do they lead out of the output folder."""
    monkeypatch.chdir(tmp_path)
    names = ['ä' * 120 + '.jpg', '-x.jpg', 'with space.jpg', 'line\nbreak.jpg']
    for name in names:
        Path(name).write_bytes(USED['jpeg'][0])
    (tmp_path / 'below').mkdir()
    monkeypatch.chdir(tmp_path / 'below')
    result = infer(detector, [f'../{name}' for name in names], 'out', progress=False)
    written = list(Path('out/pictures').iterdir())
    assert len(written) == len(result) == 4 and not result.failures
    assert not [p for p in tmp_path.iterdir() if p.name not in (*names, 'below')]


@pytest.mark.parametrize(
    'source, reason',
    [
        ('photos/on.jpg', 'on.jpg does not exist: did you mean .*photos/one.jpg'),
        ('foto/one.jpg', 'does not exist, nor does the folder foto'),
        ('photos/*.bmp', 'no picture or video matches photos/\\*.bmp'),
        ('photos/*.txt', r'\(1 other files do\)'),
        ('texts', 'texts holds no picture or video, only .txt'),
        ('nothing', 'nothing holds no picture or video: it is empty'),
        ('pipe.jpg', 'pipe.jpg is no regular file'),
        ('dangling.jpg', 'dangling.jpg does not exist'),
        ('photos/clip.mp4', 'is no video that OpenCV can read'),
        ('camera:77', 'camera 77 does not open'),
        ('http://example.com/x.jpg', 'which is not https'),
        ('HTTP://example.com/x.jpg', 'which is not https'),
        ('https://[::1/x.jpg', 'is no address'),
        ('https://localhost:1/a%00b.jpg', 'does not give the file'),
        ('photos/playlist.mp4', 'is a playlist, no video'),
        ([], 'no source is given'),
        ('https://localhost:1/x.jpg', 'does not give the file'),
        (7, 'a source is a path, an address or an array .* got int'),
        (np.zeros((4, 4), np.uint8), r'an array must be .*got \(4, 4\) of uint8'),
        (np.zeros((4, 4, 3)), 'an array must be .* of float64'),
        (np.zeros((0, 4, 3), np.uint8), 'it is empty'),
    ],
)
def test_sources_that_are_none(source, reason, detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('photos', 'texts', 'nothing'):
        Path(folder).mkdir()
    Path('photos/one.jpg').write_bytes(USED['jpeg'][0])
    Path('photos/clip.mp4').write_bytes(b'no video')
    Path('photos/a.txt').write_text('')
    Path('photos/playlist.mp4').write_text('#EXTM3U\n/etc/passwd\n')
    Path('texts/a.txt').write_text('')
    os.mkfifo('pipe.jpg')
    Path('dangling.jpg').symlink_to('nowhere')
    with pytest.raises(DataError, match=reason):
        infer(detector, source, progress=False)


def test_unreadable(detector, tmp_path, monkeypatch):
    path = tmp_path / 'locked.jpg'
    path.write_bytes(USED['jpeg'][0])

    def refused(self):  # as the system does; nothing is locked for the superuser
        raise PermissionError(errno.EACCES, 'Permission denied', str(self))

    monkeypatch.setattr(Path, 'read_bytes', refused)
    with pytest.raises(DataError, match='locked.jpg cannot be read: Permission denied'):
        infer(detector, path, progress=False)


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))


def test_standard_input(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', Stdin(USED['jpeg'][0]))
    result = infer(detector, '-', progress=False)
    assert [found.name for found in result] == ['stdin']
    for name in 'ab':
        (tmp_path / f'{name}.jpg').write_bytes(USED['jpeg'][0])
    paths = ''.join(f'{tmp_path / name}.jpg\n' for name in 'ab')
    monkeypatch.setattr(sys, 'stdin', Stdin(paths.encode()))
    assert [f.name for f in infer(detector, '-', progress=False)] == ['a', 'b']
    listed = ('\ufeff' + paths.replace('\n', '\r\n')).encode()
    for data in (listed, paths.replace('\n', '\0').encode()):
        monkeypatch.setattr(sys, 'stdin', Stdin(data))
        assert len(infer(detector, '-', progress=False)) == 2
    monkeypatch.setattr(sys, 'stdin', Stdin(b'P3 2 1 255 9 9 9 8 8 8\n'))
    assert infer(detector, '-', progress=False)[0].size == (2, 1)
    monkeypatch.setattr(sys, 'stdin', Stdin(b' \n'))
    with pytest.raises(DataError, match='standard input is empty'):
        infer(detector, '-', progress=False)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        name = self.path.rsplit('/', 1)[-1]
        self.wfile.write((REFUSED['page'] if 'page' in name else USED['jpeg'])[0])

    def log_message(self, *args):
        pass


def test_addresses(detector):
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        given = [f'{address}/photo.jpg?size=large', f'{address}/page']
        result = infer(detector, given, progress=False)
        server.shutdown()
    assert [found.name for found in result] == ['photo']
    assert 'a web page' in result.failures[0]


def video(path: Path, frames: int = 12) -> Path:
    fourcc = cv2.VideoWriter.fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(path), fourcc, 10, SIZE)
    for index in range(frames):
        writer.write(np.full((SIZE[1], SIZE[0], 3), 8 * index, np.uint8))
    writer.release()
    return path


def test_videos(detector, tmp_path):
    path = video(tmp_path / 'clip.avi')
    out = tmp_path / 'out'
    result = infer(detector, path, out, every=2, score=0, progress=False)
    assert [found.frame for found in result] == [0, 2, 4, 6, 8, 10]
    written = cv2.VideoCapture(str(out / 'pictures/clip.mp4'))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == 6
    assert written.get(cv2.CAP_PROP_FPS) == 5
    rows = list(csv.DictReader((out / 'predictions.csv').open()))
    assert {row['frame'] for row in rows} == {'0', '2', '4', '6', '8', '10'}
    assert len(infer(detector, path, limit=4, progress=False)) == 4


def test_a_video_that_ends_in_a_frame(detector, tmp_path):
    data = video(tmp_path / 'whole.avi', 30).read_bytes()
    path = tmp_path / 'cut.avi'
    path.write_bytes(data[: len(data) // 2])
    result = infer(detector, path, tmp_path / 'out', progress=False)
    assert 0 < result.pictures < 25
    assert f'ends after {result.pictures} of 30 frames' in result.failures[0]
    written = cv2.VideoCapture(str(tmp_path / 'out/pictures/cut.mp4'))
    assert written.get(cv2.CAP_PROP_FRAME_COUNT) == result.pictures


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('shapes')
    write_shapes(str(folder), 1, 3, 96)
    return folder


def test_objects_as_coco_reads_them(detector, shapes, tmp_path):
    """The written file is what the predictions are, in COCO's own reader."""
    truth = shapes / 'annotations/instances_validation.json'
    result = infer(
        detector,
        shapes / 'images/validation',
        tmp_path,
        score=0.05,
        batch=2,
        ground_truth=str(truth),
        progress=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        found, given = COCO(tmp_path / 'predictions.json'), COCO(truth)
    assert (
        found.cats.keys() == given.cats.keys()
        and found.imgs.keys() == given.imgs.keys()
    )
    rows = list(csv.DictReader((tmp_path / 'predictions.csv').open()))
    assert len(rows) == len(found.anns) == sum(len(p.labels) for p in result) > 0
    names = {n: Path(image['file_name']).name for n, image in given.imgs.items()}
    for prediction in result:
        (number,) = (n for n in names if names[n] == Path(prediction.file).name)
        written = found.imgToAnns[number]
        assert [a['score'] for a in written] == sorted(
            (a['score'] for a in written), reverse=True
        )
        for index, annotation in enumerate(written):
            left, top, right, bottom = prediction.boxes[index]
            assert annotation['bbox'] == pytest.approx(
                [left, top, right - left, bottom - top], abs=0.01
            )
            mask = found.annToMask(annotation)
            assert mask.shape == (96, 96) and mask.sum() == annotation['area']
            np.testing.assert_array_equal(mask, prediction.binary_masks()[index])
            name = given.cats[annotation['category_id']]['name']
            assert name == prediction.classes[prediction.labels[index]]
    # Ground truth on the left, what was found on the right, large enough to read.
    drawn = cv2.imread(str(next((tmp_path / 'pictures').iterdir())))
    assert drawn.shape == (672, 2 * 672, 3)
    # The shapes are coloured on the left also where nothing was found.
    infer(detector, shapes / 'images/validation', tmp_path / 'alone', progress=False)
    alone = cv2.imread(str(next((tmp_path / 'alone/pictures').iterdir())))
    assert alone.shape == (672, 672, 3)
    assert (drawn[:, :672] != alone).any()


def test_cocos_own_numbers(tmp_path):
    from mmdet.datasets import CocoDataset

    classes = CocoDataset.METAINFO['classes']
    writer = outputs.Outputs(tmp_path, classes, CocoDataset.METAINFO['palette'])
    numbers = dict(zip(classes, writer.category_ids))
    # As in COCO's annotations of 2017.
    assert numbers['person'] == 1 and numbers['stop sign'] == 13
    assert numbers['hair drier'] == 89 and numbers['toothbrush'] == 90


def test_same_numbers_as_the_librarys_inferencer(weights, shapes, tmp_path):
    """Undeployed: bit for bit; deployed: up to rounding."""
    from mmdet.apis import DetInferencer

    paths = sorted(map(str, (shapes / 'images/validation').iterdir()))
    stock = DetInferencer(
        str(ROOT / SHAPES), weights[SHAPES], device='cpu', show_progress=False
    )(paths, return_datasamples=True)['predictions']
    plain = Predictor(str(ROOT / SHAPES), weights[SHAPES], 'cpu', deploy=False)
    for expected, found in zip(stock, infer(plain, paths, score=0, progress=False)):
        np.testing.assert_array_equal(found.boxes, expected.pred_instances.bboxes)
        np.testing.assert_array_equal(found.scores, expected.pred_instances.scores)
        masks = np.array([coco_mask.decode(mask) for mask in found.masks])
        np.testing.assert_array_equal(masks, expected.pred_instances.masks)


def test_class_maps(segmentor, shapes, tmp_path):
    result = infer(
        segmentor,
        shapes / 'images/validation',
        tmp_path,
        ground_truth=str(shapes / 'annotations/validation'),
        progress=False,
    )
    rows = list(csv.DictReader((tmp_path / 'predictions.csv').open()))
    for found in result:
        written = Image.open(tmp_path / f'maps/{found.name}.png')
        assert written.mode == 'P'
        np.testing.assert_array_equal(np.asarray(written), found.class_map)
        palette = np.array(written.getpalette()).reshape(-1, 3)
        expected = segmentor.dataset_meta['palette']
        np.testing.assert_array_equal(palette[: len(expected)], expected)
        of_file = [row for row in rows if row['file'] == found.file]
        assert sum(int(row['pixels']) for row in of_file) == 96 * 96
        assert {row['class'] for row in of_file} == {
            found.classes[label] for label in np.unique(found.class_map)
        }
    drawn = cv2.imread(str(next((tmp_path / 'pictures').iterdir())))
    assert drawn.shape == (672, 2 * 672, 3)


def test_pictures_of_several_sizes(segmentor, detector):
    """A detector pads what is smaller, which moves its numbers a little."""
    images = [noise(48, 64, 3), noise(64, 48, 3), noise(48, 64, 3), noise(48, 64, 3)]
    for predictor in (segmentor, detector):
        single = infer(predictor, images, score=0, progress=False)
        batch = infer(predictor, images, score=0, batch=3, progress=False)
        assert [f.name for f in batch] == ['array', 'array_2', 'array_3', 'array_4']
        for one, other in zip(single, batch):
            if one.class_map is not None:
                np.testing.assert_array_equal(one.class_map, other.class_map)
            else:
                np.testing.assert_allclose(one.scores, other.scores, atol=0.02)


def test_test_time_augmentation(weights):
    options = [
        "tta_model=dict(type='SegTTAModel')",
        "tta_pipeline=[dict(type='LoadImageFromFile'),dict(type='TestTimeAug',"
        "transforms=[[dict(type='RandomFlip',prob=0.0),dict(type='RandomFlip',prob=1.0)],"
        "[dict(type='PackSegInputs')]])]",
    ]
    cfg = {k: eval(v) for k, _, v in (o.partition('=') for o in options)}
    plain = Predictor(str(ROOT / SEGMENTOR), weights[SEGMENTOR], 'cpu')
    both = Predictor(
        str(ROOT / SEGMENTOR), weights[SEGMENTOR], 'cpu', tta=True, cfg_options=cfg
    )
    image = noise(64, 64, 3)
    averaged = infer(both, image, progress=False)[0].class_map
    np.testing.assert_array_equal(
        averaged,
        infer(both, image[:, ::-1].copy(), progress=False)[0].class_map[:, ::-1],
    )
    assert (averaged != infer(plain, image, progress=False)[0].class_map).any()


@pytest.mark.parametrize(
    'settings, reason',
    [
        (dict(score=1.5), 'score is a number from 0 to 1, got 1.5'),
        (dict(opacity=-1), 'opacity is a number from 0 to 1'),
        (dict(batch=0), 'batch is a number from 1 on'),
        (dict(every=0), 'every is a number from 1 on'),
        (dict(limit=0), 'limit is a number from 1 on'),
        (dict(tta=True), 'are arguments of Predictor, where model is one'),
        (dict(ground_truth='none.json'), 'none.json is no file: the ground truth of a'),
        (dict(ground_truth=__file__), 'is no annotation file in COCO format'),
    ],
)
def test_settings_that_are_wrong(settings, reason, detector):
    with pytest.raises((ConfigError, DataError), match=reason):
        infer(detector, noise(48, 64, 3), progress=False, **settings)


def test_ground_truth_that_is_none(segmentor, detector, shapes, tmp_path):
    image = shapes / 'images/validation/00000.png'
    maps = tmp_path / 'truth'
    maps.mkdir()
    for wrong, reason in (
        (maps, 'holds no class maps'),
        (tmp_path / 'none', 'is no folder: the ground truth of a segmentor'),
    ):
        with pytest.raises(DataError, match=reason):
            infer(segmentor, image, ground_truth=str(wrong), progress=False)
    for wrong, reason in (
        (np.full((96, 96), 99, np.uint8), 'has class 99, and the model has 0 to 5'),
        (np.full((96, 96), 6, np.uint8), 'has class 6, and'),
        (np.full((96, 96), 258, np.uint16), 'has class 258, and'),
        (np.zeros((96, 96, 3), np.uint8), 'is no class map'),
        (np.zeros((10, 96), np.uint8), 'is 96 x 10, its picture 96 x 96'),
    ):
        cv2.imwrite(str(maps / '00000.png'), wrong)
        result = infer(
            segmentor, image, tmp_path / 'o', ground_truth=str(maps), progress=False
        )
        assert result.pictures == 1 and re.search(reason, result.failures[0])
    (maps / '00000.png').rename(maps / 'other.png')
    result = infer(segmentor, image, ground_truth=str(maps), progress=False)
    assert 'has nothing of any of these pictures' in result.failures[0]
    other = json.dumps(
        dict(images=[], annotations=[], categories=[dict(id=1, name='x')])
    )
    (tmp_path / 'other.json').write_text(other)
    with pytest.raises(DataError, match='none of the categories that the model finds'):
        infer(
            detector, image, ground_truth=str(tmp_path / 'other.json'), progress=False
        )


@pytest.mark.parametrize(
    'model, options, reason',
    [
        (SHAPES, dict(device='cuda:9'), "device 'cuda:9' cannot be used"),
        (SHAPES, dict(device='gpu'), "device 'gpu' cannot be used"),
        (SHAPES, dict(tta=True), '--tta needs tta_model and tta_pipeline'),
        (SEGMENTOR, {}, 'its weights are not those of EncoderDecoder|missing'),
        (
            'configs/imagenet/convnext-tiny_32xb128_in1k.py',
            {},
            'is for mmpretrain: pictures are looked at by detectors',
        ),
    ],
)
def test_models_that_do_not_fit(model, options, reason, weights):
    if 'imagenet' in model:
        pytest.importorskip('mmpretrain')
    with pytest.raises((ConfigError, convnext_mm.CheckpointError), match=reason):
        Predictor(str(ROOT / model), weights[SHAPES], **options)


def test_outputs_that_cannot_be_written(detector, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'nothing can be written into .*/file'):
        infer(detector, noise(48, 64, 3), tmp_path / 'file', progress=False)
    source = tmp_path / 'out/pictures/x.jpg'
    source.parent.mkdir(parents=True)
    source.write_bytes(USED['jpeg'][0])
    other = tmp_path / 'x.jpg'
    other.write_bytes(USED['jpeg'][0])
    for given in (source, [other, source]):
        with pytest.raises(ConfigError, match='is one of the sources, and would be'):
            infer(detector, given, tmp_path / 'out', progress=False)
        assert source.read_bytes() == USED['jpeg'][0]
    with pytest.raises(ConfigError, match='has no name'):
        infer(detector, other, '', progress=False)
    (tmp_path / 'o/pictures').mkdir(parents=True)
    (tmp_path / 'o/predictions.json.tmp').mkdir()
    with pytest.raises(ConfigError, match='Is a directory'):
        infer(detector, other, tmp_path / 'o', progress=False)


def test_ground_truth_stays(detector, segmentor, shapes, tmp_path):
    """Also what an earlier run found, where that is the ground truth."""
    image = shapes / 'images/validation/00000.png'
    for predictor, name in ((detector, 'predictions.json'), (segmentor, 'maps')):
        infer(predictor, image, tmp_path / name, score=0.05, progress=False)
        truth = tmp_path / name / name
        files = [truth] if truth.is_file() else list(truth.iterdir())
        before = [path.read_bytes() for path in files]
        with pytest.raises(ConfigError, match='is one of the sources'):
            infer(
                predictor,
                image,
                tmp_path / name,
                ground_truth=str(truth),
                progress=False,
            )
        assert [path.read_bytes() for path in files] == before
        result = infer(
            predictor, image, tmp_path / 'o', ground_truth=str(truth), progress=False
        )
        assert not result.failures


def test_sources_of_a_segmentor_stay(segmentor, tmp_path):
    source = tmp_path / 'maps/a.png'
    source.parent.mkdir()
    source.write_bytes(USED['png'][0])
    with pytest.raises(ConfigError, match='is one of the sources'):
        infer(segmentor, source, tmp_path, progress=False)
    assert source.read_bytes() == USED['png'][0]


def test_two_runs_in_one_folder(detector, tmp_path):
    image = noise(48, 64, 3)
    with outputs.Outputs(tmp_path, ['a'], [(0, 0, 0)]):
        (tmp_path / 'predictions.csv').write_text("the other run's")
        with pytest.raises(ConfigError, match='another run writes to'):
            infer(detector, image, tmp_path, progress=False)
        assert (tmp_path / 'predictions.csv').is_file()
    infer(detector, image, tmp_path, progress=False)
    assert (tmp_path / 'predictions.json').is_file()
    # What an earlier run found does not pass for what this one found.
    infer(detector, image, tmp_path, data=False, progress=False)
    assert not (tmp_path / 'predictions.json').exists()


def whole(folder: Path) -> list[dict]:
    """The objects in a folder, whose files must all be complete."""
    assert not list(folder.rglob('*.tmp'))
    for path in (folder / 'pictures').iterdir():
        assert cv2.imread(str(path)) is not None
    return json.loads((folder / 'predictions.json').read_text())['images']


def test_a_full_disk(detector, tmp_path, monkeypatch):
    replace, count = os.replace, 0

    def full(source, target):
        nonlocal count
        count += str(target).endswith('.jpg')
        if count == 3 and str(target).endswith('.jpg'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        replace(source, target)

    monkeypatch.setattr(os, 'replace', full)
    images = [noise(48, 64, 3) for _ in range(5)]
    with pytest.raises(ConfigError, match='No space left .* 2 pictures are done'):
        infer(detector, images, tmp_path, progress=False)
    assert len(whole(tmp_path)) == 3


@pytest.fixture
def command(weights, tmp_path, monkeypatch):
    """``convnext-mm infer`` with the detector, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> int:
        model = [str(ROOT / SHAPES), '--checkpoint', weights[SHAPES]]
        return main(['infer', *model, *map(str, arguments)])

    return run


def test_command(command, tmp_path, capsys):
    (tmp_path / 'good.jpg').write_bytes(USED['jpeg'][0])
    (tmp_path / 'alpha.png').write_bytes(USED['alpha'][0])
    (tmp_path / 'bad.jpg').write_bytes(b'no')
    assert command('good.jpg', '--score', 0, '--limit', 1) == 0
    assert 'written to outputs' in capsys.readouterr().out
    assert command('good.jpg', 'alpha.png', 'bad.jpg', '--no-data', '--out', 'o') == 1
    said = capsys.readouterr()
    assert 'alpha.png: what is transparent is white' in said.out
    assert '2 pictures' in said.out and 'not used: bad.jpg is no picture' in said.err
    assert not (tmp_path / 'o/predictions.csv').exists()
    assert {p.name for p in (tmp_path / 'o/pictures').iterdir()} == {
        'good.jpg',
        'alpha.png',
    }
    with pytest.raises(SystemExit, match='error: no picture could be used'):
        command('bad.jpg')


def test_ctrl_c(command, tmp_path, monkeypatch, capsys):
    """What was found until then is written, and valid."""
    for index in range(4):
        (tmp_path / f'{index}.jpg').write_bytes(USED['jpeg'][0])
    once = Predictor.__call__

    def interrupted(self, pictures, threshold):
        if pictures[0].name == '2':
            raise KeyboardInterrupt
        return once(self, pictures, threshold)

    monkeypatch.setattr(Predictor, '__call__', interrupted)
    assert command('.', '--score', 0) == 130
    said = capsys.readouterr()
    assert '2 pictures' in said.out and 'Stopped' in said.err
    assert len(whole(tmp_path / 'outputs')) == 2


def test_a_work_folder(weights, shapes, tmp_path, capsys):
    """What training leaves is a model: its config, and its best checkpoint."""
    work_dir = tmp_path / 'work_dirs/run'
    work_dir.mkdir(parents=True)
    Config.fromfile(ROOT / SHAPES).dump(work_dir / 'config.py')
    shutil.copy(weights[SHAPES], work_dir / 'best_coco_bbox_mAP_iter_8.pth')
    (work_dir / 'iter_9.pth').write_bytes(b'torn')
    out = tmp_path / 'out'
    folder = shapes / 'images/validation'
    assert main(['infer', str(work_dir), str(folder), '--out', str(out)]) == 0
    assert len(list((out / 'pictures').iterdir())) == 3
    assert '3 pictures' in capsys.readouterr().out
