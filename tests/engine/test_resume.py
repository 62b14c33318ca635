"""A run that was interrupted gives the weights of one that was not, bit for bit."""

import traceback
from types import SimpleNamespace

import pytest

from convnext_mm.engine.agreement import REQUEUE, Interrupted
from toy_runs import Fault, Killed, kill, make, same, terminate, weights

CASES = {
    'iterations': {},
    'epochs': dict(by_epoch=True),
    'workers': dict(workers=2),
    'epochs-workers': dict(by_epoch=True, workers=2),
    'finite': dict(loader=dict(drop_last=True)),
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
@pytest.mark.parametrize('at', [5, 10])
@pytest.mark.parametrize('how', [kill, terminate])
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


@pytest.mark.parametrize('resume', [False, True])
def test_validation_is_made_once_in_a_run(resume, tmp_path, monkeypatch):
    """One that was cut off comes again; a new run in the folder makes its own."""
    made = []
    for _ in range(2):
        runner = make(tmp_path, checkpoint=None, resume=resume)
        monkeypatch.setattr(runner, 'load_or_resume', lambda: None)
        loop = runner.build_train_loop(runner._train_loop)
        loop.val_interval, loop.dynamic_intervals = 5, [5]
        runner._train_loop = loop
        runner._val_loop = SimpleNamespace(
            run=lambda loop=loop: made.append(loop.iter), evaluator=None
        )
        monkeypatch.setattr(runner, 'build_val_loop', lambda loop: loop)
        runner.train()
    assert made == [5, 10, 11] + ([5, 10] if resume else [5, 10, 11])
