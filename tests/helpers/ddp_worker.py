"""What each process of the test of DistributedDataParallel runs. It is no test
file: processes that are spawned import it by name."""

import copy
import os

import torch
from torch.nn.parallel import DistributedDataParallel

from convnext_mm import ConvNeXt

SMALL = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])


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
