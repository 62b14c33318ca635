"""The CSV backend holds what MMEngine's own scalars.json holds."""

import csv
import json
import math

import pytest
import torch
from mmengine.registry import VISBACKENDS, init_default_scope
from mmengine.visualization import Visualizer

from convnext_mm.engine.csv_backend import CSVVisBackend
from toy_runs import Fault, Killed, kill, make

BACKENDS = [dict(type='LocalVisBackend'), dict(type='convnext_mm.CSVVisBackend')]
RECORDS = [
    (dict(loss=0.1 + 0.2, lr=1e-4, iter=1), 1),
    (dict(loss=math.nan, lr=5e-5, iter=2), 2),
    (dict(mIoU=40, note='a, "b"\nc'), 2),
    (dict(loss=torch.tensor(0.5), lr=1e-5, iter=3), 3),
]


def rows(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def assert_equal(table, records):
    assert len(table) == len(records)
    for row, record in zip(table, records):
        assert {k: v for k, v in row.items() if v} == {
            k: str(v) for k, v in record.items()
        }


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmengine'])
def test_every_scope_finds_it(scope, tmp_path):
    pytest.importorskip(scope)
    init_default_scope(scope)
    spec = dict(type='convnext_mm.CSVVisBackend', save_dir=str(tmp_path))
    assert isinstance(VISBACKENDS.build(spec), CSVVisBackend)


def test_holds_what_scalars_json_holds(tmp_path):
    visualizer = Visualizer(
        'csv', vis_backends=[dict(b) for b in BACKENDS], save_dir=str(tmp_path)
    )
    for record, step in RECORDS:
        values = {k: getattr(v, 'item', lambda v=v: v)() for k, v in record.items()}
        visualizer.add_scalars(values, step=step)
    visualizer.add_scalar('memory', 7, step=4)
    folder = tmp_path / 'vis_data'
    logged = [json.loads(s) for s in (folder / 'scalars.json').read_text().splitlines()]
    assert_equal(rows(folder / 'scalars.csv'), logged)
    assert (folder / 'scalars.csv').read_text().startswith('step,')
    assert sorted(p.name for p in folder.iterdir()) == ['scalars.csv', 'scalars.json']


def test_tensors_are_numbers(tmp_path):
    backend = CSVVisBackend(str(tmp_path))
    for record, step in RECORDS:
        backend.add_scalars(record, step)
    assert [row['loss'] for row in rows(backend.experiment)] == [
        '0.30000000000000004',
        'nan',
        '',
        '0.5',
    ]


def test_goes_on_in_a_file_that_is_there(tmp_path):
    CSVVisBackend(str(tmp_path)).add_scalars(dict(loss=1.0), 1)
    backend = CSVVisBackend(str(tmp_path))
    backend.add_scalars(dict(loss=0.5, mAP=0.1), 2)
    assert rows(backend.experiment) == [
        dict(step='1', loss='1.0', mAP=''),
        dict(step='2', loss='0.5', mAP='0.1'),
    ]


def test_a_disk_that_refuses_a_new_column_keeps_the_old_file(tmp_path, monkeypatch):
    backend = CSVVisBackend(str(tmp_path))
    backend.add_scalars(dict(loss=1.0), 1)
    before = backend.experiment.read_text()

    def refuse(*args):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as context:
        context.setattr('convnext_mm.engine.csv_backend.write_text', refuse)
        with pytest.raises(OSError, match='No space'):
            backend.add_scalars(dict(mAP=0.1), 2)
    assert backend.experiment.read_text() == before
    backend.add_scalars(dict(mAP=0.1), 2)
    assert rows(backend.experiment)[-1] == dict(step='2', loss='', mAP='0.1')


def settings():
    """Of a short run; runners change what they get."""
    return dict(
        scores={4: 0.1, 8: 0.3, 11: 0.2},
        visualizer=dict(type='Visualizer', vis_backends=[dict(b) for b in BACKENDS]),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)
        ),
        log_processor=dict(by_epoch=False),
    )


@pytest.mark.slow
def test_a_resumed_run_has_a_file_for_each_start(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, Fault(6, kill), **settings()).train()
    first = next(tmp_path.glob('*/vis_data'))
    first.parent.rename(tmp_path / '20000101_000000')
    make(tmp_path, resume=True, **settings()).train()
    folders = sorted(tmp_path.glob('*/vis_data'))
    assert len(folders) == 2
    for folder in folders:
        logged = (folder / 'scalars.json').read_text().splitlines()
        assert_equal(rows(folder / 'scalars.csv'), [json.loads(s) for s in logged])
    assert [row['step'] for row in rows(folders[1] / 'scalars.csv')][:3] == [
        '5',
        '6',
        '7',
    ]
