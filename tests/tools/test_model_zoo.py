"""model-index.yml, the metafiles and the page made from them."""

import json
from pathlib import Path

import pytest

from convnext_mm.analysis.complexity import count, default_shape, total
from recipe_models import RECIPES, load, model_of
from repo import ROOT, load_tool

modelindex = pytest.importorskip('modelindex')
PUBLISHED = json.loads((ROOT / 'tests/data/recipes.json').read_text())


@pytest.fixture(scope='module')
def index():
    return modelindex.load(str(ROOT / 'model-index.yml'))


@pytest.fixture(scope='module')
def models(index):
    """Config to model, as mim puts it together; without what others trained."""
    index.build_models_with_collections()
    return {model.config: model for model in index.models if '::' not in model.name}


def zoo():
    return load_tool('maintenance/make_model_zoo')


def test_valid_for_mim(index):
    assert index.check(silent=True) == []


def test_every_recipe_is_listed(index, models):
    assert set(RECIPES) <= set(models)
    assert len(models) == sum('::' not in model.name for model in index.models)
    collections = {collection.name for collection in index.collections}
    for config, model in models.items():
        assert (ROOT / config).is_file() and model.name == Path(config).stem
        assert model.in_collection in collections
        assert model.full_model.paper


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: Path(path).stem)
def test_figures_are_current(path, models):
    shape = default_shape(load(path))
    cost = total(count(model_of(path), shape))
    metadata = models[path].metadata.data
    assert metadata['FLOPs Input'] == f'{shape[0]} x {shape[1]}'
    assert (metadata['Parameters'], metadata['FLOPs']) == cost
    paper = metadata.get('FLOPs in G (paper)')
    if paper:  # V2's too
        assert cost.flops / 1e9 == pytest.approx(paper, rel=0.01)
    if metadata.get('Parameters in M (paper)'):
        assert round(cost.params / 1e6) == metadata['Parameters in M (paper)']


def test_the_papers_results(models):
    """All 13 rows of the paper's tables, marked as its own."""
    found = set()
    for model in models.values():
        metrics = {
            name: value
            for result in model.results or ()
            for name, value in result.metrics.items()
        }
        assert all(name.endswith((' (paper)', ' (ours)')) for name in metrics)
        if model.in_collection == 'ConvNeXt':
            found.add(tuple(metrics.values()))
    for entry in PUBLISHED['detection']:
        assert (entry['paper']['box_mAP'], entry['paper']['mask_mAP']) in found
    for entry in PUBLISHED['segmentation']:
        assert (entry['paper']['mIoU_ss'], entry['paper']['mIoU_ms_flip']) in found


def test_page_is_current():
    assert zoo().main(['--check']) == 0


def test_page_that_is_not(tmp_path, monkeypatch, capsys):
    module = zoo()
    monkeypatch.setattr(module, 'ROOT', ROOT)
    page = ROOT / 'docs' / 'none.md'
    monkeypatch.setattr(module, 'PAGE', page)
    assert module.main(['--check']) == 1
    assert 'docs/none.md is not current' in capsys.readouterr().out
    monkeypatch.setattr(module, 'PAGE', tmp_path / 'docs' / 'zoo.md')
    assert module.main([]) == 0 and module.main(['--check']) == 0
    text = (tmp_path / 'docs' / 'zoo.md').read_text()
    assert '| 85.9 (86) | 740.2 (741) | 800 x 1280 | 50.4 paper |' in text
