"""Sharded training over two gloo processes, next to DistributedDataParallel's."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.model import is_model_wrapper
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn
from torch.distributed.fsdp import FSDPModule

from convnext_mm.analysis.complexity import build_model
from convnext_mm.analysis.scaling import shard_dim, shard_size
from convnext_mm.checkpoint import CheckpointMismatchError
from convnext_mm.checkpoint.reader import read_checkpoint
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.sharding import FullyShard, check_sharding, parameters_of_units
from repo import ROOT, free_port, load_tool
from sharded_runs import CASES, SHARDED, Classifier, Runner, config, train_all, worker


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Work folders of sharded runs that were compared with others as they went:
    losses, norms of gradients and weights of 20 steps, with clipping, layer
    decay and validation on an odd number of images; then of 10 steps that
    resume each kind of run from each other."""
    folder = tmp_path_factory.mktemp('runs')
    mp.spawn(worker, (free_port(), train_all, folder), nprocs=2)
    return folder


def described(node):
    """A checkpoint with types and shapes for values."""
    if isinstance(node, dict):
        # The config differs, and what it is called.
        skip = ('settings', 'cfg', 'runtime_info')
        return {k: described(v) for k, v in node.items() if k not in skip}
    if isinstance(node, list):
        return list(map(described, node))
    return getattr(node, 'shape', None) or type(node)


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_checkpoint_is_like_any_other(runs, name):
    sharded, ddp = (
        read_checkpoint(runs / f'{name}-{kind}/iter_20.pth')
        for kind in ('sharded', 'ddp')
    )
    assert described(sharded) == described(ddp)
    for a, b in (
        (sharded['state_dict'], ddp['state_dict']),
        (sharded['optimizer']['state'], ddp['optimizer']['state']),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_goes_on_in_one_process(runs, tmp_path):
    path = str(runs / 'plain-sharded/iter_10.pth')
    settings = dict(launcher='none', load_from=path, resume=True, env_cfg={})
    runner = Runner(**config(tmp_path, SHARDED, iters=11, **CASES['plain'], **settings))
    runner.train()
    assert runner.iter == 11


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group(
        'gloo', rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


def test_shards_of_one_process(alone):
    """Whole weights go in and out; validation may come before training."""
    torch.manual_seed(0)
    model = Classifier(use_grn=True)
    names = [name for name, _ in model.named_parameters()]
    state = copy.deepcopy(model.state_dict())
    images = torch.rand(2, 3, 32, 64)
    expected = model.eval()(images)
    wrapper = FullyShard(model)
    assert is_model_wrapper(wrapper) and wrapper.module is model
    wrapper.shard()
    params = dict(model.named_parameters())
    assert list(params) == names
    assert all(type(param.data).__name__ == 'DTensor' for param in params.values())
    assert isinstance(model.backbone.stages[2][1], FSDPModule)
    torch.testing.assert_close(model.state_dict(), state)
    torch.testing.assert_close(wrapper.eval()(images), expected)
    assert type(model.head.weight.data) is torch.Tensor
    wrapper.train()
    assert type(model.head.weight.data).__name__ == 'DTensor'
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    mmengine_checkpoint.load_state_dict(model, zeros)
    torch.testing.assert_close(model.state_dict(), zeros)
    del zeros['backbone.stages.1.0.grn.gamma']
    with pytest.raises(CheckpointMismatchError, match='stages.1.0.grn.gamma'):
        mmengine_checkpoint.load_state_dict(model, zeros)


def test_needs_a_convnext_and_its_runner():
    with pytest.raises(ConfigError, match='BatchNorm2d has none'):
        FullyShard(nn.BatchNorm2d(3))
    model = Classifier()
    with pytest.raises(ConfigError, match='tools/train.py'):
        FullyShard(model).train_step({}, None)
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match='scalar scale of Classifier'):
        FullyShard(model)


WRAPPED = dict(model_wrapper_cfg=SHARDED)


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(runner_type='FlexibleRunner', strategy=dict(type='FSDPStrategy')),
            "strategy.type='FSDPStrategy'.*leave runner_type",
        ),
        (
            dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
            "'MMFullyShardedDataParallel' saves checkpoints",
        ),
        (
            dict(
                optim_wrapper=dict(
                    optimizer=dict(
                        type='mmengine.ZeroRedundancyOptimizer', optimizer_type='AdamW'
                    )
                )
            ),
            "ZeroRedundancyOptimizer' waits for ever",
        ),
        (dict(WRAPPED, runner_type='Other'), "runner_type='Other'"),
        (dict(WRAPPED, custom_hooks=[dict(type='EMAHook')]), "has 'EMAHook'"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_sharding(Config(settings))


def test_needs_a_newer_pytorch(monkeypatch):
    monkeypatch.delattr(torch.distributed.fsdp, 'fully_shard')
    check_sharding(Config({}))
    with pytest.raises(ConfigError, match='2.6 or newer'):
        check_sharding(Config(WRAPPED))


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs/sharded').glob('*.py')), ids=lambda path: path.stem
)
def test_configs(path):
    """Each is a recipe, and nothing else than sharded."""
    cfg, base = (
        Config.fromfile(p).to_dict()
        for p in (path, path.parent.parent / 'upernet' / path.name.replace('-fsdp', ''))
    )
    check_sharding(Config(cfg))
    assert cfg.pop('model_wrapper_cfg') == SHARDED
    assert cfg == base
    model = build_model(Config(cfg))
    units = parameters_of_units(model)
    assert len(units) == sum(model.backbone.depths) + 3 + 1
    assert sum(p.numel() for unit in units for p in unit) == sum(
        p.numel() for p in model.parameters()
    )


def test_padding():
    """A dimension that all processes have a part of, where there is one."""
    assert shard_dim((1, 1, 1, 48), 16) == 3
    assert shard_dim((1, 1, 1, 40), 16) == 0
    assert shard_dim((40, 16), 16) == 0
    assert shard_size((1, 1, 1, 48), 16) == 3
    assert shard_size((40, 16), 16) == 3 * 16
    assert shard_size((3,), 16) == 1


@pytest.mark.slow
def test_page_is_current():
    assert load_tool('maintenance/make_scaling').main(['--check']) == 0
