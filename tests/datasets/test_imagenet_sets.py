"""ImageNet's other test sets: folders, what is wrong with them, and the metrics."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis import zoo
from convnext_mm.apis.config import load_config
from convnext_mm.apis.config_check import check_config
from convnext_mm.checkpoint.remote import cache_path
from convnext_mm.cli import main
from convnext_mm.datasets.data_check import DataError, check_dataset
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.datasets.imagenet_sets import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    WNIDS,
    CorruptionError,
    ImageNetCorrupted,
    ImageNetFolders,
    SubsetAccuracy,
    class_labels,
)
from recipe_models import load
from repo import ROOT, parsed

MODELS = [model for model in zoo.models() if 'robustness' in str(model.config)]
TWO = ('n01440764', 'n01498041')  # tench, and stingray, which A and R have: 0 and 6
KINDS = ('fog', 'snow')


def draw(folder: Path, number: int = 1, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(number):
        pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.JPEG')


@pytest.fixture
def folders(tmp_path):
    """Two classes, with 1 and 2 images."""
    root = tmp_path / 'plain'
    for number, wnid in enumerate(TWO, 1):
        draw(root / wnid, number)
    (root / 'README.txt').write_text('of the archive')
    return root


@pytest.fixture
def corrupted(tmp_path):
    """Two classes, two corruptions, two severities, and an extra corruption."""
    for kind in (*KINDS, 'spatter'):
        for severity in '12':
            for seed, wnid in enumerate(TWO):
                draw(tmp_path / 'corrupted' / kind / severity / wnid, seed=seed)
    return tmp_path / 'corrupted'


def of(folder, **settings):
    return ImageNetCorrupted(
        data_root=str(folder),
        **{'corruptions': KINDS, 'severities': (1, 2), 'classes': TWO, **settings},
    )


def sample(label, scores=None, **more):
    """As an evaluator gets it; ``scores`` are those above 0, by label."""
    pred = torch.zeros(1000)
    for index, score in (scores or {}).items():
        pred[index] = score
    return dict(pred_score=pred, gt_label=torch.tensor([label]), **more)


def fault(dataset) -> str:
    with pytest.raises(DataError) as caught:
        dataset.full_init()
    return str(caught.value)


def test_the_table_of_classes():
    timm = pytest.importorskip('timm.data')
    synsets = list(timm.ImageNetInfo('imagenet-1k').label_names())
    assert list(class_labels('all')) == synsets
    assert list(class_labels('all').values()) == list(range(1000))
    info = Path(timm.__file__).parent / '_info'
    for name in 'ar':
        indices = (info / f'imagenet_{name}_indices.txt').read_text().split()
        assert list(class_labels(name).values()) == list(map(int, indices))
    assert len(WNIDS.read_text().splitlines()) == 1002


def test_images_and_labels(folders):
    dataset = ImageNetFolders(data_root=str(folders), classes=TWO)
    paths = [str(folders / p) for p in (f'{TWO[0]}/0.JPEG', f'{TWO[1]}/0.JPEG')]
    found = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert [info['gt_label'] for info in found] == [0, 6, 6]
    assert [info['img_path'] for info in found[:2]] == paths
    assert len(dataset.metainfo['classes']) == 1000 and dataset.test_mode


def test_cells(corrupted):
    dataset = of(corrupted)
    cells = [
        (info['corruption'], info['severity'], info['gt_label'])
        for info in map(dataset.get_data_info, range(len(dataset)))
    ]
    assert cells == [(k, s, label) for k in KINDS for s in (1, 2) for label in (0, 6)]
    assert len(CORRUPTIONS['c']) == 15 and len(CORRUPTIONS['c-bar']) == 10


@pytest.mark.parametrize('kind', [ImageNetFolders, ImageNetCorrupted])
def test_settings_that_are_wrong(kind):
    for settings, reason in (
        (dict(classes='b'), "'b' is none of"),
        (dict(classes=['n0']), 'n0'),
        (dict(classes=[]), 'n01440764'),
        (dict(corruptions='d'), "'c-bar'"),
        (dict(corruptions=()), 'at least one'),
        (dict(severities=(0, 6)), r'\(0, 6\)'),
    ):
        if kind is ImageNetFolders and 'classes' not in settings:
            continue
        with pytest.raises(DataError, match=reason):
            kind(data_root='.', **settings)


def test_class_folders_that_are_wrong(folders):
    def dataset(root=folders, classes=TWO):
        return ImageNetFolders(data_root=str(root), classes=classes)

    (folders / 'tench').mkdir()
    assert '1 folders that are no classes of ImageNet, [tench]' in fault(dataset())
    (folders / 'tench').rmdir()
    (folders / TWO[0] / '0.JPEG').rename(folders / TWO[0] / '0.txt')
    said = fault(dataset())
    assert "1 class folders without an image, the first is 'n01440764'" in said
    shutil.rmtree(folders / TWO[0])
    assert "lacks 1 of 2 class folders, the first is 'n01440764'" in fault(dataset())
    assert 'lacks 199 of 200 class folders' in fault(dataset(classes='a'))
    assert 'cannot be listed' in fault(dataset(folders / 'no'))


def test_corruptions_that_are_missing(corrupted):
    said = fault(of(corrupted, corruptions='c'))
    assert 'lacks 13 of 15 corruptions, [gaussian_noise, ' in said
    assert 'jpeg_compression]' in said and 'it has [fog, snow, spatter]' in said
    assert "is 'snow' meant to be 'snows'?" in fault(
        of(corrupted, corruptions=['snows'])
    )
    shutil.rmtree(corrupted / 'snow' / '2')
    assert 'lacks severities: snow [2]' in fault(of(corrupted))
    (corrupted / 'weather').mkdir()
    shutil.move(corrupted / 'fog', corrupted / 'weather')
    assert "out of 'weather'" in fault(of(corrupted))


def test_an_unreadable_image_is_named(corrupted):
    path = corrupted / 'fog' / '1' / TWO[0] / '0.JPEG'
    path.write_bytes(b'no image')
    init_default_scope('mmpretrain')
    pytest.importorskip('mmpretrain.datasets')
    dataset = of(corrupted, pipeline=[dict(type='LoadImageFromFile')])
    with pytest.raises(DataError, match=re.escape(repr(str(path)))):
        check_dataset(dataset)


def test_data_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in MODELS:
        cfg = Config.fromfile(model.config)
        with pytest.raises(
            DataError, match=r"data_root 'data/imagenet-.*(github|zenodo)"
        ):
            check_data(cfg, ['test_dataloader'])


def test_prediction_among_the_classes_of_a_set():
    """Tench is no class of ImageNet-A: the next best of them counts."""
    metric = SubsetAccuracy(classes='a')
    metric.process(None, [sample(6, {0: 0.9, 6: 0.1}), sample(11, {6: 0.5, 11: 0.4})])
    assert metric.evaluate(2) == {'accuracy/top1': 50.0}


def test_mean_corruption_error():
    """By hand: of 4 images per severity, as many are wrong as the severity says, for
    fog one less; sums over severities by AlexNet's, as the paper defines it."""
    metric, by_hand = CorruptionError(), []
    samples = []
    for name, alexnet in ALEXNET_ERRORS.items():
        wrongs = []
        for severity in range(1, 6):
            wrong = min(4, severity - (name == 'fog'))
            wrongs.append(wrong / 4)
            samples += [
                sample(0, {int(i < wrong): 1}, corruption=name, severity=severity)
                for i in range(4)
            ]
        by_hand.append(sum(wrongs) / (5 * alexnet))
    metric.process(None, samples)
    found = metric.evaluate(len(samples))
    assert found['corruption/mCE'] == pytest.approx(100 * sum(by_hand) / 15)
    fog, snow = (0 + 25 + 50 + 75 + 100) / 5, (25 + 50 + 75 + 100 + 100) / 5
    assert found['corruption/fog'] == pytest.approx(fog)
    assert found['corruption/snow'] == pytest.approx(snow)
    mean = (14 * snow + fog) / 15
    assert found['corruption/mean_error'] == pytest.approx(mean)


def test_an_alexnet_has_100():
    """The published errors give the published normalisation."""
    metric, samples = CorruptionError(), []
    for name, error in ALEXNET_ERRORS.items():
        wrong = round(error * 1000)
        for severity in range(1, 6):
            samples += [
                sample(0, {int(i < wrong): 1}, corruption=name, severity=severity)
                for i in range(0, 1000, 10)
            ]
    metric.process(None, samples)
    found = metric.evaluate(len(samples))['corruption/mCE']
    assert found == pytest.approx(100, abs=1)


def test_no_mce_of_some():
    """Nor of other corruptions."""
    for name in ('fog', 'sparkles'):
        metric = CorruptionError()
        metric.process(None, [sample(0, {0: 1}, corruption=name, severity=3)])
        assert set(metric.evaluate(1)) == {
            f'corruption/{name}',
            'corruption/mean_error',
        }


def test_every_row_of_the_table(data_dir):
    table = json.loads((data_dir / 'paper_tables.json').read_text())['robustness']
    found = {}
    for model in MODELS:
        arch = model.arch, '22k' in model.pretraining.lower()
        data = model.metadata['Test Data']
        found.setdefault(arch, {})[data] = next(iter(model.metrics.values()))
    letters = dict(T='tiny', B='base', L='large', XL='xlarge')
    columns = ('ImageNet-C', 'ImageNet-C-bar', 'ImageNet-A', 'ImageNet-R')
    columns = (*columns, 'ImageNet-Sketch')
    published = {
        (letters[name.partition('-')[2]], data.startswith('22K')): dict(
            zip(columns, figures)
        )
        for name, data, _clean, *figures in table['rows']
        if name.startswith('ConvNeXt')
    }
    assert found == published and len(MODELS) == 25
    page = (ROOT / 'docs' / 'robustness.md').read_text()
    for row in table['rows']:
        cells = ' | '.join('' if cell is None else str(cell) for cell in row)
        assert f'| {cells} |'.replace('|  |', '| |') in page


@pytest.mark.parametrize('model', MODELS, ids=lambda model: model.name)
def test_configs(model):
    """The model of the ImageNet recipe, with its test pipeline; sets by their names."""
    size = '-384px' if '384px' in model.name else ''
    names = {
        'convnext-tiny': 'convnext-tiny_32xb128_in1k',
        'convnext-base': 'convnext-base_32xb128_in1k',
        'convnext-base-in22k-pre-384px': 'convnext-base-in22k-pre_32xb16_in1k-384px',
        'convnext-large-in22k-pre-384px': 'convnext-large-in22k-pre_32xb16_in1k-384px',
        'convnext-xlarge-in22k-pre-384px': 'convnext-xlarge-in22k-pre_64xb8_in1k-384px',
    }
    stem, _, data = model.name.partition('_')
    recipe = zoo.find(names[stem])
    ours = load(str(model.config.relative_to(ROOT)))
    theirs = load(str(recipe.config.relative_to(ROOT)))
    for part in ('backbone', 'head'):
        kept = ('type', 'arch', 'in_channels', 'num_classes', 'gap_before_final_norm')
        assert [ours.model[part].get(k) for k in kept] == [
            theirs.model[part].get(k) for k in kept
        ]
    assert ours.data_preprocessor == theirs.data_preprocessor
    for key in ('Parameters', 'FLOPs', 'FLOPs Input'):
        assert model.metadata[key] == recipe.metadata[key]
    pipeline = ours.test_dataloader.dataset.pipeline
    assert pipeline == ours.test_pipeline
    assert ours.data_root.rstrip('/') == f'data/{data}'
    expected = theirs.test_dataloader.dataset.pipeline
    if data in ('imagenet-c', 'imagenet-c-bar') and not size:
        expected = [expected[0], *expected[2:]]  # images have the size of the crop
    assert pipeline[:-1] == expected[:-1]
    # Without training settings, too, it is a whole config of a test.
    check_config(ours, 'test')


def released(cfg) -> dict:
    """Weights of a classifier under the names of the paper's release."""
    torch.manual_seed(0)
    state = {}
    for name, value in build_model(cfg, 'cpu').state_dict().items():
        name = name.replace('backbone.norm3', 'norm').replace('head.fc', 'head')
        value = torch.randn_like(value) * 0.1
        state[name.removeprefix('backbone.')] = value
    return state


@pytest.mark.slow
@pytest.mark.parametrize('data', ['imagenet-c', 'imagenet-r'])
def test_the_command(data, folders, corrupted, tmp_path, monkeypatch, capfd):
    """A classifier in the layout of the paper's release, and a table beside what is
    published."""
    pytest.importorskip('mmpretrain')
    monkeypatch.chdir(tmp_path)
    name = f'convnext-tiny_{data}'
    root = corrupted if data == 'imagenet-c' else folders
    options = [
        'model.backbone.arch=atto',
        'model.head.in_channels=320',
        'test_dataloader.num_workers=0',
        f'test_dataloader.dataset.classes=[{",".join(TWO)}]',
    ]
    if data == 'imagenet-c':
        options += [
            f'test_dataloader.dataset.corruptions=[{",".join(KINDS)}]',
            'test_dataloader.dataset.severities=[1,2]',
        ]
    monkeypatch.setenv('CONVNEXT_MM_CACHE', str(tmp_path / 'cache'))
    weights = cache_path(zoo.find(name).weights)
    weights.parent.mkdir(parents=True)
    arguments = ('test', name, '--data-root', root, '--cfg-options', *options)
    cfg = load_config(name, cfg_options=parsed(*arguments)['cfg_options'])
    state = released(cfg)
    torch.save(dict(model=state), weights)
    assert main(list(map(str, arguments))) == 0
    out, err = capfd.readouterr()
    rows = [line.replace('│', ' ').split() for line in out.splitlines()]
    if data == 'imagenet-c':
        # Of two corruptions there is no mCE to put beside the published one.
        assert 'Top-1 error in %, by severity' in out + err
        assert not any('(paper)' in row for row in rows)
        errors = [re.findall(rf'corruption/{kind}: ([\d.]+)', out) for kind in KINDS]
        (mean,) = re.findall(r'corruption/mean_error: ([\d.]+)', out)
        assert float(mean) == pytest.approx(np.mean([float(e) for (e,) in errors]))
    else:
        assert f'{name}, published on ImageNet-R' in out
        (row,) = (row for row in rows if '(paper)' in row)
        measured, published, difference = map(float, row[-3:])
        (top1,) = re.findall(r'accuracy/top1: ([\d.]+)', out)
        assert (measured, published) == (pytest.approx(float(top1), abs=0.01), 47.2)
        assert difference == pytest.approx(measured - published, abs=0.011)
    state['head.weight'] = state['head.weight'][:5]
    torch.save(dict(model=state), weights)
    with pytest.raises(SystemExit, match=r'needs head.weight of \(1000, 320\)'):
        main(list(map(str, arguments)))
