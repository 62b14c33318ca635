"""Recipes and trained models by name."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config

from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis import zoo
from convnext_mm.checkpoint import CheckpointDownloadError, CheckpointError
from convnext_mm.checkpoint.remote import cache_path
from convnext_mm.cli import main
from convnext_mm.datasets.errors import DataError
from convnext_mm.engine.errors import ConfigError
from recipe_models import model_of
from repo import ROOT

# Of the paper's authors, with names and shapes of all that their configs build in
# mmdet 2.11.0 and mmseg 0.11.0.
RELEASED = json.loads((ROOT / 'tests/data/released_models.json').read_text())
OPENMMLAB = [model for model in zoo.models() if '::' in model.name]


def layout(model: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize('name', RELEASED)
def test_released_models(name):
    facts, model = RELEASED[name], zoo.find(name)
    assert model.weights == facts['url']
    assert model.metadata['License'] and model.metadata['Trained By']
    figures = {
        'box AP (paper)': 'box_mAP',
        'mask AP (paper)': 'mask_mAP',
        'mIoU (paper)': 'mIoU_ss',
        'mIoU(ms+flip) (paper)': 'mIoU_ms_flip',
    }
    assert model.metrics == {n: facts[k] for n, k in figures.items() if k in facts}
    config = str(model.config.relative_to(ROOT))
    assert layout(model_of(config)) == facts['layout']


def test_all_released_models_are_there():
    assert len(RELEASED) == 13 and len(OPENMMLAB) == 10
    # Classifiers on other test sets: tests/datasets/test_imagenet_sets.py.
    trained = {
        model.name
        for model in zoo.models()
        if model.weights and 'robustness' not in model.config.parts
    }
    assert trained == {*RELEASED, *(model.name for model in OPENMMLAB)}


def pipeline(cfg: Config) -> list[dict]:
    """What happens to a picture before a model sees it."""
    return [
        {k: v for k, v in step.items() if k not in ('backend_args', '_scope_')}
        for step in cfg.test_pipeline
        if step['type'] != 'LoadAnnotations'
    ]


@pytest.mark.parametrize('model', OPENMMLAB, ids=lambda model: model.name)
def test_openmmlabs_models(model):
    """Those of MMDetection and MMSegmentation fit the configs of this package: the
    same heads, test settings and pipeline around the same backbone."""
    package, _, name = model.name.partition('::')
    folder = Path(pytest.importorskip(package).__file__).parent / '.mim/configs'
    (path,) = folder.glob(f'*/{name}.py')
    (metafile,) = path.parent.glob('metafile.y*ml')
    entries = yaml.safe_load(metafile.read_text())['Models']
    (entry,) = (e for e in entries if e['Name'] == name)
    assert model.weights == entry['Weights']
    results = entry['Results']
    results = results if isinstance(results, list) else [results]
    theirs = [value for result in results for value in result['Metrics'].values()]
    assert list(model.metrics.values()) == theirs
    original, own = Config.fromfile(path), Config.fromfile(model.config)
    assert pipeline(original) == pipeline(own)
    assert original.model.test_cfg == own.model.test_cfg
    for key in ('mean', 'std', 'bgr_to_rgb'):
        assert original.model.data_preprocessor[key] == own.model.data_preprocessor[key]
    backbones = original.model.backbone, own.model.backbone
    for key in ('arch', 'out_indices', 'layer_scale_init_value'):
        given = [b.get(key) for b in backbones]
        assert len({tuple(v) if isinstance(v, list) else v for v in given} - {None}) < 2
    original.model.backbone.type = 'convnext_mm.ConvNeXt'
    assert layout(build_model(original)) == layout(build_model(own))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CONVNEXT_MM_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


@pytest.fixture
def quick_build(monkeypatch):
    """Weights that a file replaces need no random values."""
    for name in vars(torch.nn.init):
        if name.endswith('_') and not name.startswith('_'):
            monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.slow
@pytest.mark.parametrize('name', RELEASED)
def test_a_file_of_each_layout(name, cache, quick_build, tmp_path, capsys):
    """By name, from the cache, through the command that users have."""
    facts = RELEASED[name]
    state = {
        key: torch.full(shape, 0.01, dtype=torch.half) if shape else torch.tensor(0)
        for key, shape in facts['layout'].items()
    }
    path = cache_path(facts['url'])
    path.parent.mkdir(parents=True)
    torch.save(dict(meta=dict(epoch=36), state_dict=state), path)
    cv2.imwrite(str(tmp_path / 'photo.jpg'), np.zeros((32, 32, 3), np.uint8))
    small = 'test_dataloader.dataset.pipeline.1.scale=(64,64)'
    arguments = ('infer', name, tmp_path / 'photo.jpg', '--out', tmp_path / 'out')
    assert main([*map(str, arguments), '--cfg-options', small]) == 0
    assert (tmp_path / 'out/pictures/photo.jpg').is_file()
    # One parameter less, and nothing is loaded.
    del state[next(key for key in state if 'head' in key and key.endswith('bias'))]
    torch.save(dict(state_dict=state), path)
    with pytest.raises(SystemExit, match='missing keys in source state_dict'):
        main(list(map(str, arguments)))
    shutil.rmtree(cache)


def test_without_a_network(cache, monkeypatch):
    """The message says which file to put where, and then it is taken."""
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:1')
    model = zoo.find('mask-rcnn_convnext-t')
    with pytest.raises(CheckpointDownloadError) as caught:
        model.fetch()
    place = str(caught.value).split(' and put it at ')[1]
    assert place.startswith(str(cache)) and model.weights in str(caught.value)
    assert model.cached is None
    torch.save({}, place)
    assert model.fetch() == place and str(model.cached) == place


def test_names():
    names = [n for m in zoo.models() for n in (m.name, *m.aliases)]
    assert len(names) == len({name.lower() for name in names})
    assert zoo.find('MASK-RCNN_ConvNeXt-T').arch == 'tiny'
    assert zoo.find('mmseg::upernet_convnext-xl-in22k').arch == 'xlarge'
    assert zoo.find('resnet') is None
    archs = {model.arch for model in zoo.models()}
    assert {'atto', 'tiny', 'xlarge', 'xxlarge', 'huge'} <= archs
    assert {model.tasks for model in zoo.models()} == {
        ('detection', 'instance'),
        ('detection',),
        ('semantic',),
        ('classification',),
    }
    shown = zoo.find('upernet_convnext-b').shortest
    assert shown == 'upernet_convnext-b'


@pytest.mark.parametrize(
    'model, checkpoint, reason',
    [
        ('mask-rcnn_convnet-t', None, 'did you mean mask-rcnn_convnext-t'),
        ('nothing-like-it', None, '`convnext-mm zoo` lists'),
        (
            'docs/images/detections.jpg',
            None,
            'neither a config nor the name of a model',
        ),
        ('configs/custom/retinanet_convnext-t_fpn_1x_coco.py', None, 'is a config'),
        ('mask-rcnn_convnext-v2-b-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco', None, 'recipe'),
    ],
)
def test_what_is_no_trained_model(model, checkpoint, reason, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=reason):
        zoo.resolve(model, checkpoint)


def test_work_folders(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match='holds no configs'):
        zoo.resolve(str(tmp_path))
    (tmp_path / 'recipe.py').write_text('')
    with pytest.raises(ConfigError, match='holds no checkpoint yet'):
        zoo.resolve(str(tmp_path))
    torch.save(dict(state_dict={}), tmp_path / 'iter_10.pth')
    torch.save(dict(state_dict={}), tmp_path / 'iter_20.pth')
    (tmp_path / 'iter_30.pth').write_bytes(b'torn')
    config = str(tmp_path / 'recipe.py')
    assert zoo.resolve(str(tmp_path)) == (config, str(tmp_path / 'iter_20.pth'), None)
    torch.save(dict(state_dict={}), tmp_path / 'best_mIoU_iter_10.pth')
    assert zoo.resolve(str(tmp_path))[1].endswith('best_mIoU_iter_10.pth')
    (tmp_path / 'best_mIoU_iter_10.pth').write_bytes(b'torn')
    assert zoo.resolve(str(tmp_path))[1].endswith('iter_20.pth')
    (tmp_path / 'script.py').write_text('')
    with pytest.raises(ConfigError, match='holds 2 configs'):
        zoo.resolve(str(tmp_path))
    dumped = tmp_path / '20260101_000000/vis_data/config.py'
    dumped.parent.mkdir(parents=True)
    dumped.write_text('')
    assert zoo.resolve(str(tmp_path))[0] == str(dumped)
    for path in tmp_path.glob('*.pth'):
        path.write_bytes(b'torn')
    (tmp_path / 'best_mIoU_iter_10.pth').unlink()
    with pytest.raises(CheckpointError, match='none can be read'):
        zoo.resolve(str(tmp_path))


def test_a_checkpoint_for_a_recipe_of_the_zoo():
    name = 'upernet_convnext-t'
    config, checkpoint, known = zoo.resolve(name, 'my.pth')
    assert Path(config) == zoo.find(name).config
    assert checkpoint == 'my.pth' and known is None


def test_command(capsys):
    main(['zoo', '--trained', '--task', 'semantic', '--arch', 'xlarge', '--json'])
    found = json.loads(capsys.readouterr().out)
    assert [m['aliases'] for m in found] == [
        ['upernet_convnext-xl-in22k'],
        ['mmseg::upernet_convnext-xl-in22k'],
    ]
    main(['zoo', '--pretraining', 'fcmae', '--task', 'detection'])
    said = capsys.readouterr().out
    assert 'recipes, 0 with trained weights' in said and 'v2-h' in said
    main(['zoo', 'mask-rcnn_convnext-t'])
    said = capsys.readouterr().out
    assert RELEASED['mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco']['url'] in said
    assert 'MIT' in said
    with pytest.raises(SystemExit, match='did you mean upernet_convnext-t'):
        main(['zoo', 'upernet_convnet-t'])
    with pytest.raises(SystemExit, match='nothing like that'):
        main(['zoo', '--trained', '--arch', 'atto'])


@pytest.mark.parametrize('corruptions', [(), ('fog',)])
def test_missing_data_before_weights_are_fetched(corruptions, tmp_path, monkeypatch):
    """Hundreds of megabytes for an evaluation that cannot start."""
    from convnext_mm.apis.corruptions import test_corruptions
    from convnext_mm.apis.test import test

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CONVNEXT_MM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(zoo.Model, 'fetch', lambda model: pytest.fail('fetched'))
    with pytest.raises(DataError, match='instances_val2017.json'):
        if corruptions:
            test_corruptions('mask-rcnn_convnext-t', corruptions=corruptions)
        else:
            test('mask-rcnn_convnext-t')
