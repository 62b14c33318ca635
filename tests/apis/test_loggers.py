"""Loggers that are added to a config."""

import pytest
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.visualization import LocalVisBackend

from convnext_mm.apis import loggers
from convnext_mm.apis.loggers import LOGGERS, add_loggers
from convnext_mm.engine.errors import ConfigError

LOCAL = dict(type='LocalVisBackend')
CSV = dict(type='convnext_mm.CSVVisBackend')


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    monkeypatch.setattr(loggers, 'find_spec', lambda name: name)


def backends(**settings):
    cfg = Config(settings)
    add_loggers(cfg, ['csv', 'tensorboard', 'csv'])
    return [*cfg.visualizer.vis_backends]


@pytest.mark.parametrize(
    'visualizer, kept',
    [
        (None, [LOCAL]),
        (dict(type='DetLocalVisualizer', vis_backends=[LOCAL]), [LOCAL]),
        (dict(type='DetLocalVisualizer', vis_backends=LOCAL), [LOCAL]),
        (dict(type='DetLocalVisualizer', vis_backends=None), []),
        (dict(type='SegLocalVisualizer'), []),
        (dict(type='Visualizer', vis_backends=[dict(type=LocalVisBackend)]), None),
    ],
)
def test_what_is_there_stays(visualizer, kept):
    kept = visualizer['vis_backends'] if kept is None else kept
    added = [CSV, dict(type='TensorboardVisBackend')]
    assert backends(visualizer=visualizer) == [*kept, *added]


def test_a_config_without_a_visualizer(tmp_path):
    cfg = Config({})
    add_loggers(cfg, ['csv'])
    built = VISUALIZERS.build(
        dict(cfg.visualizer, name='loggers', save_dir=str(tmp_path))
    )
    built.add_scalar('loss', 1.0)
    names = sorted(p.name for p in (tmp_path / 'vis_data').iterdir())
    assert names == ['scalars.csv', 'scalars.json']


@pytest.mark.parametrize('kind', ['CSVVisBackend', 'convnext_mm.CSVVisBackend'])
def test_none_is_added_twice(kind):
    found = backends(visualizer=dict(type='Visualizer', vis_backends=[dict(type=kind)]))
    assert [b['type'] for b in found] == [kind, 'TensorboardVisBackend']


def test_no_names_change_nothing():
    cfg = Config(dict(model=dict(type='X')))
    add_loggers(cfg, [])
    assert 'visualizer' not in cfg


@pytest.mark.parametrize('name', [n for n, logger in LOGGERS.items() if logger.package])
def test_a_package_that_is_missing(name, monkeypatch):
    monkeypatch.setattr(loggers, 'find_spec', lambda name: None)
    cfg = Config({})
    with pytest.raises(ConfigError, match=f'{name}.*`pip install {name}`'):
        add_loggers(cfg, ['csv', name])
    assert 'visualizer' not in cfg


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="'neptune' is unknown: one of tensorboard"):
        add_loggers(Config({}), ['neptune'])


def test_mmengine_has_the_backends():
    from mmengine.registry import VISBACKENDS

    assert all(VISBACKENDS.get(logger.backend) for logger in LOGGERS.values())
