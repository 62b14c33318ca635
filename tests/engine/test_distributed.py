"""DistributedDataParallel over two gloo processes."""

import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import Config
from torch.nn.parallel import DistributedDataParallel

from convnext_mm.engine.launch import process_group
from ddp_worker import worker
from repo import at_least, free_port

CASES = [
    dict(out_indices=indices, **settings)
    for indices in ((0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3))
    for settings in (
        dict(impl='eager'),
        dict(impl='lean', use_grn=True),
        dict(impl='lean+', frozen_stages=1, with_cp=True),
    )
]


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason='torch without gloo'
)
def test_ddp_without_unused_parameters():
    mp.spawn(worker, (free_port(), CASES), nprocs=2)


def gloo_threads():
    """Names of this process's threads that gloo runs."""
    names = [p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm')]
    return [name for name in names if 'gloo' in name]


@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='no /proc')
def test_no_thread_of_gloo_outlives_a_run(monkeypatch):
    """One that lets go of a tensor while Python shuts down aborts it."""
    values = dict(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), RANK=0, WORLD_SIZE=1
    )
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with process_group(Config(dict(launcher='pytorch'))):
        model = DistributedDataParallel(torch.nn.Linear(2, 1))
        model.itself = [model]  # as a runner and its hooks hold each other
        model(torch.rand(1, 2)).sum().backward()
        del model
        if not gloo_threads() and not at_least('2.10'):
            pytest.skip('PyTorch below 2.10 gives the threads of gloo no names')
        assert gloo_threads()
    assert not torch.distributed.is_initialized()
    end = time.monotonic() + 10  # the system lists a thread a while after its end
    while gloo_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert not gloo_threads()
