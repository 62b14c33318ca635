"""A run that was interrupted gives the weights of one that was not, bit for bit."""

import traceback
from types import SimpleNamespace

import pytest

from convnext_mm.engine.agreement import REQUEUE, Interrupted
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.work_folder import VALIDATED
from toy_runs import Fault, Killed, kill, make, same, terminate, weights

CASES = {
    'iterations': {},
    'epochs': dict(by_epoch=True),
    'workers': dict(workers=2),
    'epochs-workers': dict(by_epoch=True, workers=2),
    'finite': dict(finite=True),
    'average': dict(hooks=[dict(type='EMAHook', momentum=0.1)]),
    'accumulation': dict(optim_wrapper=dict(accumulative_counts=3)),
    'epochs-accumulation': dict(
        by_epoch=True, optim_wrapper=dict(accumulative_counts=3)
    ),
    'amp': dict(
        optim_wrapper=dict(type='convnext_mm.AmpOptimWrapper', dtype='bfloat16')
    ),
    'clipping': dict(optim_wrapper=dict(clip_grad=dict(max_norm=0.1))),
}


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """Weights of undisturbed runs by case."""
    known = {}

    def get(case):
        if case not in known:
            runner = make(tmp_path_factory.mktemp('straight'), **CASES[case])
            runner.train()
            known[case] = weights(runner)
        return known[case]

    return get


@pytest.mark.slow
@pytest.mark.parametrize('how, at', [(terminate, 5), (kill, 10)])
@pytest.mark.parametrize('case', CASES)
def test_resumed_is_undisturbed(case, how, at, straight, tmp_path):
    stopped = make(tmp_path, Fault(at, how), **CASES[case])
    with pytest.raises((Killed, Interrupted)) as error:
        stopped.train()
    traceback.clear_frames(error.tb)
    stopped.writer.wait()
    if how is terminate:
        assert error.value.code == REQUEUE
    fault = Fault()
    resumed = make(tmp_path, fault, resume=True, **CASES[case])
    resumed.train()
    assert same(weights(resumed), straight(case))
    waits = 2 if 'accumulation' in case else 0  # for the weights to change
    if how is terminate:
        assert fault.first is None or at <= fault.first <= at + waits
    assert fault.first is None or at - 4 - waits <= fault.first


@pytest.mark.parametrize(
    'resume, start, validated, expected',
    [
        (False, 0, '11', [5, 10, 11]),  # what ran before does not matter
        (True, 10, '10', [11]),
        (True, 10, '5', [10, 11]),  # it was cut off
    ],
)
def test_validation_is_made_once(
    resume, start, validated, expected, tmp_path, monkeypatch
):
    made = []
    (tmp_path / VALIDATED).write_text(validated)
    runner = make(tmp_path, checkpoint=None, resume=resume)
    monkeypatch.setattr(runner, 'load_or_resume', lambda: None)
    loop = runner.build_train_loop(runner._train_loop)
    loop.val_interval, loop.dynamic_intervals, loop._iter = 5, [5], start
    runner._train_loop = loop
    runner._val_loop = SimpleNamespace(run=lambda: made.append(loop.iter))
    monkeypatch.setattr(runner, 'build_val_loop', lambda loop: loop)
    runner.train()
    assert made == expected


def test_what_a_schedule_learned_from_validation_comes_again(tmp_path):
    """The checkpoint after step 8 is from before the validation after step 8."""

    def start(folder, fault=None, **settings):
        plateau = dict(
            type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=0
        )
        scores = {4: 0.5, 8: 0.4, 11: 0.3}
        return make(folder, fault, param_scheduler=plateau, scores=scores, **settings)

    straight = start(tmp_path / 'straight')
    straight.train()
    assert straight.optim_wrapper.get_lr()['lr'][0] < 0.01
    assert (tmp_path / 'straight' / VALIDATED).read_text() == '11'
    stopped = start(tmp_path / 'stopped', Fault(9, kill))
    with pytest.raises(Killed):
        stopped.train()
    assert (tmp_path / 'stopped' / VALIDATED).read_text() == '8'
    fault = Fault()
    resumed = start(tmp_path / 'stopped', fault, resume=True)
    resumed.train()
    assert fault.first == 8
    assert same(weights(resumed), weights(straight))


def test_data_without_a_batch_is_refused(tmp_path):
    runner = make(tmp_path, batch_size=100, finite=True, loader=dict(drop_last=True))
    with pytest.raises(ConfigError, match='gives no batch.*100 images'):
        runner.train()
