"""DistributedDataParallel over two gloo processes."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.config import Config
from torch.nn.parallel import DistributedDataParallel

from convnext_mm import ConvNeXt
from convnext_mm.engine.launch import process_group
from repo import free_port

SMALL = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])
CASES = [
    dict(out_indices=indices, **settings)
    for indices in ((0,), (1,), (2,), (3,), (0, 2), (0, 1, 2, 3))
    for settings in (
        dict(impl='eager'),
        dict(impl='lean', use_grn=True),
        dict(impl='lean+', frozen_stages=1, with_cp=True),
    )
]


def loss_of(outs):
    # Not a plain sum: the sum of a LayerNorm's output has no gradient.
    return sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).mean() for y in outs)


def worker(rank, port, cases):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    for settings in cases:
        torch.manual_seed(0)
        model = ConvNeXt(SMALL, layer_scale_init_value=1.0, **settings)
        single = copy.deepcopy(model)
        images = torch.rand(4, 3, 64, 64)
        # static_graph=False, find_unused_parameters=False: a parameter that
        # gets no gradient makes the second step fail.
        ddp = DistributedDataParallel(model)
        for _ in range(2):
            ddp.zero_grad()
            loss_of(ddp(images[2 * rank : 2 * rank + 2])).backward()
        (sum(loss_of(single(images[i : i + 2])) for i in (0, 2)) / 2).backward()
        for (name, p), q in zip(model.named_parameters(), single.parameters()):
            if q.requires_grad:
                torch.testing.assert_close(
                    p.grad, q.grad, rtol=1e-4, atol=1e-7, msg=f'{settings} {name}'
                )
            else:
                assert p.grad is None
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason='torch without gloo'
)
def test_ddp_without_unused_parameters():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, CASES), nprocs=2)


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
        assert gloo_threads()
    assert not torch.distributed.is_initialized()
    assert not gloo_threads()
