"""A NaN neither reaches the weights nor passes unnoticed."""

import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from torch import nn

from convnext_mm.checkpoint import read_checkpoint
from convnext_mm.engine.errors import ConfigError, TrainingError
from convnext_mm.engine.hooks.non_finite_hook import gradient_norm
from convnext_mm.engine.work_folder import checkpoints
from toy_runs import Model, make, same, weights


class Poison(Hook):
    """Makes the data of some steps not finite."""

    priority = 'HIGHEST'

    def __init__(self, *steps, value=math.nan):
        self.steps, self.value, self.seen = steps, value, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in self.steps:
            data_batch['image'][0, 0, 0, 0] = self.value

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append([p.detach().clone() for p in runner.model.parameters()])


class WithBatchNorm(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(20), self.head)


@pytest.fixture
def said(monkeypatch):
    """Warnings of the runs of a test."""
    lines = []
    log = MMLogger.callHandlers
    monkeypatch.setattr(
        MMLogger,
        'callHandlers',
        lambda self, record: lines.append(record.getMessage()) or log(self, record),
    )
    return lines


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize(
    'optim_wrapper',
    [
        {},
        dict(clip_grad=dict(max_norm=1.0)),
        dict(clip_grad=dict(type='value', clip_value=1.0)),
        dict(accumulative_counts=2),
        dict(type='convnext_mm.AmpOptimWrapper', dtype='bfloat16'),
    ],
)
def test_bad_step_is_skipped_and_named(value, optim_wrapper, said, tmp_path):
    torch.manual_seed(0)
    poison = Poison(6, value=value)
    runner = make(
        tmp_path,
        poison,
        model=WithBatchNorm(),
        loader=dict(drop_last=True),
        optim_wrapper=optim_wrapper,
    )
    runner.train()
    before, after = poison.seen[4], poison.seen[5]
    assert all(map(torch.equal, before, after))
    assert not all(map(torch.equal, before, poison.seen[7]))
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights(runner))
    (line,) = [line for line in said if 'is skipped' in line]
    assert 'Step 6' in line and 'loss is nan in process 0' in line
    assert '1 in a row, 1 in all' in line
    assert runner.message_hub.get_info('skipped_steps') == 1


def test_limit_stops_with_evidence(tmp_path):
    runner = make(
        tmp_path,
        Poison(6, 7, 8, 9, 10, 11),
        default_hooks=dict(non_finite=dict(type='convnext_mm.NonFiniteHook', limit=3)),
    )
    with pytest.raises(TrainingError, match='3 steps in a row.*step 8.*iter_4.pth'):
        runner.train()
    runner.writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ['iter_4.pth']
    evidence = read_checkpoint(tmp_path / 'nonfinite_iter_8_rank_0.pth')
    assert evidence['iteration'] == 7 and evidence['seed'] == 3
    assert evidence['batches'][0]['image'].isnan().any()
    assert math.isnan(evidence['losses'][0]['loss'])


def test_no_good_checkpoint_goes_while_steps_are_skipped(tmp_path):
    """Also at the end of a run, where the last one is saved."""
    make(tmp_path, Poison(*range(6, 12))).train()
    assert [p.name for p in checkpoints(tmp_path)] == ['iter_11.pth', 'iter_4.pth']


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Break(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == 8:
                with torch.no_grad():
                    runner.model.head[1].bias[0] = math.inf

    runner = make(tmp_path, Break())
    with pytest.raises(TrainingError, match=r'head.1.bias is not finite after step 8'):
        runner.train()
    runner.writer.wait()
    assert [p.name for p in checkpoints(tmp_path)] == ['iter_4.pth']


def test_huge_learning_rate_ends_in_a_sentence(tmp_path):
    runner = make(
        tmp_path,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e30)),
        default_hooks=dict(non_finite=dict(type='convnext_mm.NonFiniteHook', limit=3)),
    )
    with pytest.raises(TrainingError, match='smaller learning rate'):
        runner.train()


def test_rollback_goes_on_with_the_next_data(said, tmp_path):
    hook = dict(type='convnext_mm.NonFiniteHook', limit=2, rollbacks=1)
    poison = Poison(6, 7)
    runner = make(tmp_path, poison, default_hooks=dict(non_finite=hook))

    def once(runner, batch_idx, data_batch=None):
        if len(poison.seen) in (5, 6):
            data_batch['image'][0] = math.nan

    poison.before_train_iter = once
    runner.train()
    assert runner.iter == 11
    assert len(poison.seen) == 11 + 7 - 4  # back from 7 to 4
    assert any('Back to' in line for line in said)
    assert runner.train_loop.position.taken + 4 * runner.train_loop.position.round == 14


def test_rollback_of_epochs_is_refused(tmp_path):
    hook = dict(type='convnext_mm.NonFiniteHook', rollbacks=1)
    runner = make(tmp_path, by_epoch=True, default_hooks=dict(non_finite=hook))
    with pytest.raises(ConfigError, match='IterBasedTrainLoop'):
        runner.train()


def test_without_faults_nothing_changes(tmp_path):
    guarded = make(tmp_path / 'guarded')
    guarded.train()
    bare = make(tmp_path / 'bare', default_hooks=dict(non_finite=None))
    bare.train()
    assert same(weights(guarded), weights(bare))


def test_norm_of_gradients():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))]
    optimizer = torch.optim.SGD(params, lr=1.0)
    assert gradient_norm(optimizer) == 0
    params[0].grad = torch.tensor([1.0, 2.0, 2.0])
    assert gradient_norm(optimizer) == pytest.approx(3)
    params[1].grad = torch.full((2, 2), 2.0)
    assert gradient_norm(optimizer) == pytest.approx(5)
    params[1].grad[0, 0] = -math.inf
    assert gradient_norm(optimizer) == math.inf
