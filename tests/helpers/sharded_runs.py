"""Small training runs in two gloo processes, sharded and not."""

import os

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from convnext_mm import ConvNeXt
from convnext_mm.analysis.scaling import replicated, sharded
from convnext_mm.engine.runner import Runner
from convnext_mm.engine.sharding import parameters_of_units

ARCH = dict(depths=[1, 1, 2, 1], channels=[8, 12, 16, 21])
DDP = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
MAX_NORM = 0.1
SHARDED = dict(type='convnext_mm.FullyShard')


class Images(Dataset):
    """Drawn at random, each the same whenever it is asked for."""

    def __init__(self, length=80):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.rand(3, 32, 64, generator=generator), labels=index % 3)


class Classifier(BaseModel):
    """A network with batch norm and a layer that is frozen."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = ConvNeXt(ARCH, out_indices=3, **backbone)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(21, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, inputs, labels=None, mode='tensor'):
        maps = self.backbone(self.bn(inputs))[-1]
        scores = self.head(maps.mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(scores, labels))
        return list(scores)


class Count(BaseMetric):
    """How many images were predicted, in all processes."""

    def process(self, data_batch, data_samples):
        self.results += [len(sample) for sample in data_samples]

    def compute_metrics(self, results):
        return dict(count=len(results))


def config(work_dir, wrapper, iters=20, val=3, **settings):
    torch.manual_seed(0)
    loader = dict(
        batch_size=2,
        num_workers=0,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    cfg = dict(
        model=Classifier(layer_scale_init_value=1.0, **settings.pop('backbone', {})),
        work_dir=str(work_dir),
        experiment_name=os.path.basename(work_dir),
        launcher='pytorch',
        cfg=Config(dict(model_wrapper_cfg=wrapper)),
        train_dataloader=dict(dataset=Images(), **loader),
        train_cfg=dict(by_epoch=False, max_iters=iters, val_interval=10),
        val_dataloader=dict(dataset=Images(val), **dict(loader, batch_size=1)),
        val_cfg={},
        val_evaluator=Evaluator([Count()]),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)
        ],
        optim_wrapper=dict(
            constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(decay_rate=0.8),
            clip_grad=dict(max_norm=MAX_NORM),
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        ),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=10),
            logger=dict(type='LoggerHook', interval=1),
        ),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=0),
        log_level='WARNING',
    )
    cfg['optim_wrapper'].update(settings.pop('optim_wrapper', {}))
    return {**cfg, **settings}


def train(work_dir, wrapper, **settings):
    """Losses, gradient norms, metrics and whole weights of a training run."""
    runner = Runner(**config(work_dir, wrapper, **settings))
    assert is_model_wrapper(runner.model)
    runner.train()
    weights = {k: v.clone() for k, v in runner.model.module.state_dict().items()}
    scalars = {
        name: torch.tensor(scalar.data[0])
        for name, scalar in runner.message_hub.log_scalars.items()
        if name in ('train/loss', 'train/grad_norm', 'val/count')
    }
    assert scalars['val/count'].unique().item() == 3  # by both processes
    return scalars, weights


def worker(rank, port, job, *args):
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    job(*args)
    torch.distributed.destroy_process_group()


def check_equal(found, expected):
    is_first = torch.distributed.get_rank() == 0  # which has whole weights
    count = 2 if is_first else 1
    torch.testing.assert_close(found[:count], expected[:count], rtol=1e-5, atol=1e-5)


CASES = dict(
    plain=dict(
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True)
        )
    ),
    everything=dict(
        backbone=dict(use_grn=True, with_cp=True, frozen_stages=1, impl='eager'),
        optim_wrapper=dict(
            type='convnext_mm.AmpOptimWrapper', dtype='bfloat16', accumulative_counts=2
        ),
    ),
)


def train_all(folder):
    for name, settings in CASES.items():
        expected = train(folder / f'{name}-ddp', DDP, **settings)
        assert len(expected[0]['train/loss']) == 20
        assert expected[0]['train/grad_norm'].min() > 2 * MAX_NORM
        found = train(folder / f'{name}-sharded', SHARDED, **settings)
        check_equal(found, expected)
        for start, wrapper in (
            ('sharded', SHARDED),
            ('sharded', DDP),
            ('ddp', SHARDED),
        ):
            again = train(
                folder / f'{name}-{start}-{wrapper["type"]}',
                wrapper,
                load_from=str(folder / f'{name}-{start}/iter_10.pth'),
                resume=True,
                **settings,
            )
            for scalars, _ in (again, expected):  # those of the process that saved
                scalars['train/loss'][:10] = 0
            check_equal(again, expected)
    check_bytes(folder)
    check_load(folder)


class CountBytes(Hook):
    """What this process gives to collectives in each step, and gets from one other
    process."""

    COLLECTIVES = (
        'all_gather_into_tensor',
        'all_gather_single',  # its name in newer PyTorch
        'reduce_scatter_tensor',
        'reduce_scatter_single',
    )

    def __init__(self):
        self.steps, self.count = [], 0

    def before_train(self, runner):
        for name in self.COLLECTIVES:
            if hasattr(torch.distributed, name):
                collective = getattr(torch.distributed, name)
                setattr(torch.distributed, name, self.counting(collective))
        if isinstance(runner.model, DistributedDataParallel):
            runner.model.register_comm_hook(None, self.reduce)

    def counting(self, collective):
        def counted(*args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if torch.is_tensor(t)]
            self.count += min(t.nbytes for t in tensors)
            return collective(*args, **kwargs)

        return counted

    def reduce(self, state, bucket):
        self.count += bucket.buffer().nbytes  # half of it twice
        return allreduce_hook(state, bucket)

    def before_train_iter(self, runner, *args, **kwargs):
        self.count = 0

    def after_train_iter(self, runner, *args, **kwargs):
        self.steps.append(self.count)


def check_load(folder):
    """Weights of another family's names start a sharded run, and a sharded run's
    checkpoint is tested."""
    path = folder / 'plain-sharded/iter_20.pth'
    state = torch.load(path, weights_only=False)['state_dict']
    others = {
        k.replace('dwconv', 'depthwise_conv').replace('pwconv', 'pointwise_conv'): v
        for k, v in state.items()
    }
    assert others.keys() != state.keys()
    torch.save(others, folder / f'others-{torch.distributed.get_rank()}.pth')
    source = str(folder / f'others-{torch.distributed.get_rank()}.pth')
    _, weights = train(folder / 'others', SHARDED, load_from=source, iters=1)
    before = Runner(**config(folder / 'test', SHARDED, load_from=str(path)))
    assert before.val() == dict(count=3)
    if torch.distributed.get_rank() == 0:
        for name, tensor in before.model.module.state_dict().items():
            torch.testing.assert_close(tensor, state[name])
            if tensor.is_floating_point():  # one step later
                torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0.05)


def check_bytes(folder):
    """What processes hold and send is what :mod:`convnext_mm.analysis.scaling`
    computes."""
    for wrapper in (DDP, SHARDED):
        runner = Runner(
            **config(
                folder / f'bytes-{wrapper["type"]}',
                wrapper,
                iters=3,
                backbone=dict(use_grn=True),
            )
        )
        model = runner.model.module
        expected = (
            sharded(parameters_of_units(model), 2)
            if wrapper is SHARDED
            else replicated(model.parameters(), 2)
        )
        check_cost(runner, expected)


def check_cost(runner, expected):
    hook = CountBytes()
    runner.register_hook(hook)
    runner.train()
    assert hook.steps == [expected.sent] * 3

    def local(tensor):
        return getattr(tensor, '_local_tensor', tensor).nbytes

    runner.model.train()  # the last validation has gathered
    optimizer = runner.optim_wrapper.optimizer
    is_replicated = isinstance(runner.model, DistributedDataParallel)
    held = sum(map(local, runner.model.parameters())) + is_replicated * hook.steps[0]
    for param, state in optimizer.state.items():
        gradient = local(param)
        held += gradient + local(state['exp_avg']) + local(state['exp_avg_sq'])
    if torch.distributed.get_rank() == 0:  # which has the larger part of odd sizes
        assert held == expected.held
    else:
        assert 0.9 * expected.held < held <= expected.held
