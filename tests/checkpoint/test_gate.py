"""MMEngine's own ways to load a checkpoint: nothing in it acts, and a ConvNeXt
gets all of its weights or the run stops."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.model import (
    BaseModel,
    BaseModule,
    MMDistributedDataParallel,
    PretrainedInit,
)
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler import MultiStepLR
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint
from mmengine.runner.checkpoint import load_state_dict
from safetensors.torch import save_file
from torch import nn

import convnext_mm
from attacks import PAYLOAD, zipped
from convnext_mm import CheckpointError, ConvNeXt
from convnext_mm.checkpoint import (
    CheckpointFileError,
    CheckpointMismatchError,
    UnsafeCheckpointError,
    read_checkpoint,
)
from convnext_mm.checkpoint.errors import CheckpointWriteError
from convnext_mm.checkpoint.orders import without_orders
from convnext_mm.checkpoint.reader import SAFE_TORCH
from convnext_mm.engine.errors import address_of
from repo import ROOT, at_least, load_tool
from warm_python import warm_python


class Call:
    """Pickles to a call."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    return path


@pytest.fixture
def evil(tmp_path, weights):
    path = tmp_path / 'evil.pth'
    path.write_bytes(zipped({**weights, 'x': Call()}))
    return str(path)


class Model(BaseModel):
    """A backbone and a head."""

    def __init__(self, arch, backbone=None, **kwargs):
        super().__init__(**kwargs)
        self.backbone = ConvNeXt(arch, **(backbone or {}))
        self.head = Head()

    def forward(self, *args, **kwargs):
        return {}


class Head(BaseModule):
    def __init__(self):
        super().__init__(dict(type='Constant', layer='Linear', val=3.0))
        self.fc = nn.Linear(20, 2)


# How users name the initializer, in MMEngine's registry or by its class.
TYPES = [
    'Pretrained',
    'mmengine.Pretrained',
    'PretrainedInit',
    'mmengine.model.PretrainedInit',
    'mmengine.model.weight_init.PretrainedInit',
]


@pytest.mark.parametrize('kind', TYPES)
@pytest.mark.parametrize('where', ['backbone', 'model', 'head', 'override'])
def test_no_name_of_the_initializer_reads_a_pickle(kind, where, arch, evil, canary):
    if kind == 'PretrainedInit':
        kind = PretrainedInit
    init_cfg = dict(type=kind, checkpoint=evil)
    if where == 'backbone':
        model = ConvNeXt(arch, init_cfg=init_cfg)
    else:
        model = Model(arch)
        if where == 'override':
            model.init_cfg = dict(
                type='Constant',
                layer='Linear',
                val=1,
                override=dict(init_cfg, name='head'),
            )
        else:
            (model if where == 'model' else model.head).init_cfg = init_cfg
    with pytest.raises(UnsafeCheckpointError, match='system'):
        model.init_weights()
    assert not canary.exists()


@pytest.mark.parametrize('kind', TYPES)
def test_what_is_pretrained_stays(kind, arch, tmp_path, model):
    """Other initializers come first, whatever the name."""
    if kind == 'PretrainedInit':
        kind = PretrainedInit
    whole = Model(arch)
    whole.backbone.load_state_dict(model.state_dict())
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / 'whole.pth')
    init_cfg = [
        dict(type=kind, checkpoint=str(tmp_path / 'whole.pth')),
        dict(type='Constant', layer=['Conv2d', 'Linear'], val=7.0),
    ]
    loaded = Model(arch, init_cfg=init_cfg)
    loaded.init_weights()
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), whole.state_dict().values())
    )
    assert loaded.init_cfg == init_cfg


def test_override_cannot_load_a_part_of_a_backbone(arch, tmp_path, weights):
    torch.save(weights, tmp_path / 'a.pth')
    override = dict(
        type='Pretrained', name='stages', checkpoint=str(tmp_path / 'a.pth')
    )
    model = ConvNeXt(
        arch, init_cfg=dict(type='Constant', layer='Linear', val=1.0, override=override)
    )
    with pytest.raises(ValueError, match='override.*top level'):
        model.init_weights()


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w: w,
        lambda w: dict(model={f'backbone.{k}': t for k, t in w.items()}),
        lambda w: {'head.fc.weight': torch.ones(2, 20)},
        lambda w: {f'encoder.{k}': t for k, t in w.items()},
    ],
)
@pytest.mark.parametrize('where', ['init_cfg', 'load'])
def test_weights_elsewhere_do_not_leave_noise(wrap, where, arch, weights, tmp_path):
    path = str(tmp_path / 'a.pth')
    torch.save(wrap(weights), path)
    with pytest.raises(CheckpointMismatchError, match='ConvNeXt'):
        if where == 'load':
            mmengine_load_checkpoint(Model(arch), path)
        else:
            Model(
                arch, init_cfg=dict(type='Pretrained', checkpoint=path)
            ).init_weights()
    partial = Model(arch, backbone=dict(allow_partial=True))
    mmengine_load_checkpoint(partial, path)


def test_wrapped_models_are_found(arch):
    model = Model(arch)
    tta = pytest.importorskip('mmseg.models').SegTTAModel(module=model)
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    for wrapper in (tta, wrapped):
        with pytest.raises(CheckpointMismatchError, match="behind 'backbone.'"):
            load_state_dict(wrapper, {'head.fc.weight': torch.ones(2, 20)})
        load_state_dict(wrapper, model.state_dict())


def test_a_detector_that_places_the_names_itself(arch):
    """As MMDetection's semi-supervised ones do."""

    class Student(Model):
        def __init__(self):
            super().__init__(arch)
            self.student = Model(arch)
            del self.backbone, self.head

        def _load_from_state_dict(self, state_dict, *args):
            for key in list(state_dict):
                state_dict[f'student.{key}'] = state_dict.pop(key)
            super()._load_from_state_dict(state_dict, *args)

    source = Model(arch)
    target = Student()
    load_state_dict(target, source.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(target.state_dict().values(), source.state_dict().values())
    )


def test_two_networks_of_which_one_would_win(arch, tmp_path):
    state = Model(arch).state_dict()
    both = {**state, **{f'module.{key}': t + 1 for key, t in state.items()}}
    torch.save(dict(state_dict=both), tmp_path / 'a.pth')
    with pytest.raises(CheckpointFileError, match='two networks'):
        mmengine_load_checkpoint(Model(arch), str(tmp_path / 'a.pth'))


def test_nothing_that_mmengine_acts_on_comes_through(weights):
    content = without_orders(
        dict(
            state_dict=weights,
            meta=dict(
                config='a',
                cfg='b',
                epoch='c',
                iter=3,
                seed='d',
                dataset_meta=dict(classes=('x',)),
                time='now',
            ),
            message_hub=dict(
                log_scalars=dict(loss='x'),
                resumed_keys=dict(iter=True, cfg=True, b='c'),
                runtime_info=dict(
                    cfg='a',
                    best_ckpt='/etc',
                    last_ckpt='b',
                    best_score=0.5,
                    keep_ckpt_ids=[1, 2],
                    other_ids=['../x'],
                    iter=3,
                ),
            ),
        )
    )
    assert content['meta'] == dict(
        iter=3, dataset_meta=dict(classes=('x',)), time='now'
    )
    assert content['message_hub'] == dict(
        log_scalars={},
        resumed_keys=dict(iter=True),
        runtime_info=dict(best_score=0.5, keep_ckpt_ids=[1, 2], iter=3),
    )


@pytest.mark.parametrize(
    'state',
    [
        3,
        None,
        'weights',
        [1],
        {3: 4},
        {'\x1b[31m': torch.ones(1)},
        {'a\nb': torch.ones(1)},
        {'\ud800': torch.ones(1)},
    ],
)
def test_state_dicts_that_are_none(state):
    with pytest.raises(CheckpointFileError) as error:
        without_orders(dict(state_dict=state))
    assert str(error.value).isprintable()


def make_optimizer(arch, amp=False, **options):
    model = Model(arch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    wrapper = (
        convnext_mm.AmpOptimWrapper(optimizer=optimizer)
        if amp
        else OptimWrapper(optimizer)
    )
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    wrapper.optimizer.step()
    return wrapper


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('fused', [False, True])
def test_state_of_another_optimizer_is_refused(amp, fused, arch):
    """Fused kernels write to it unseen."""
    wrapper = make_optimizer(arch, amp, fused=fused)
    good = wrapper.state_dict()
    wrapper.load_state_dict(copy.deepcopy(good))

    def state(**changes):
        changed = copy.deepcopy(good)
        for values in changed['state'].values():
            values.update(changes)
        return changed

    def group(**changes):
        return dict(good, param_groups=[dict(good['param_groups'][0], **changes)])

    expanded = copy.deepcopy(good)
    for values in expanded['state'].values():
        values['exp_avg'] = torch.ones(1).expand(values['exp_avg'].shape)
    without_step = state()
    for values in without_step['state'].values():
        del values['step']
    for case in (
        state(exp_avg=torch.ones(1000)),
        state(exp_avg_sq=torch.ones(1, 1)),
        state(exp_avg='x'),
        state(exp_avg=3),
        state(step=torch.ones(7)),
        state(step=torch.zeros(0)),
        state(other=torch.ones(())),
        without_step,
        group(lr='x'),
        group(lr=None),
        group(betas=(0.9,)),
        group(fused='x'),
        group(lr=nested(45)),
        dict(good, param_groups=3),
        dict(good, param_groups=[]),
    ):
        with pytest.raises(CheckpointMismatchError, match='optimizer') as error:
            make_optimizer(arch, amp, fused=fused).load_state_dict(copy.copy(case))
        assert len(str(error.value)) < 500
    wrapper.load_state_dict(group(fused=not fused, foreach=True))
    assert wrapper.optimizer.param_groups[0]['fused'] is fused
    # One number for all is one for each, with memory of its own.
    wrapper.load_state_dict(expanded)
    for param, values in wrapper.optimizer.state.items():
        assert values['exp_avg'].stride() == param.stride()
        assert bool((values['exp_avg'] == 1).all())


def test_state_of_another_memory_layout(arch):
    wrapper = make_optimizer(arch, fused=True)
    state = copy.deepcopy(wrapper.state_dict())
    for values in state['state'].values():
        if values['exp_avg'].dim() == 4:
            values['exp_avg'] = torch.rand_like(values['exp_avg']).to(
                memory_format=torch.channels_last
            )
    expected = [values['exp_avg'] for values in state['state'].values()]
    wrapper.load_state_dict(state)
    for (param, values), average in zip(wrapper.optimizer.state.items(), expected):
        assert values['exp_avg'].stride() == param.stride()
        assert torch.equal(values['exp_avg'], average)


def nested(depth):
    """2 ** depth numbers, made of few."""
    value = 1
    for _ in range(depth):
        value = [value, value]
    return value


def test_settings_of_groups_may_differ(arch):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [
        torch.optim.Adam(
            [dict(params=params[:1], amsgrad=True), dict(params=params[1:])]
        )
        for _ in range(2)
    ]
    wrappers = [OptimWrapper(optimizer) for optimizer in optimizers]
    for param in params:
        param.grad = torch.ones(3)
    optimizers[0].step()
    wrappers[1].load_state_dict(wrappers[0].state_dict())
    closure = OptimWrapper(torch.optim.LBFGS(params))
    closure.load_state_dict(closure.state_dict())


@pytest.mark.parametrize(
    'optimizer',
    [
        dict(loss_scaler='x'),
        dict(loss_scaler=dict(scale='x')),
        dict(base_param_settings='x'),
        dict(base_param_settings=dict(lr='x')),
        dict(generator=dict(base_param_settings=dict(lr='x'))),
    ],
)
def test_what_lies_beside_the_state_of_an_optimizer(optimizer, weights):
    with pytest.raises(CheckpointFileError, match='optimizer'):
        without_orders(dict(state_dict=weights, optimizer=optimizer))


def test_state_of_another_scheduler_is_refused(arch):
    wrapper = make_optimizer(arch)
    scheduler = MultiStepLR(wrapper, milestones=[3], by_epoch=False)
    state = scheduler.state_dict()
    scheduler.load_state_dict(copy.deepcopy(state))
    for case in (
        dict(state, _get_value=3),
        dict(state, last_step='x'),
        dict(state, milestones=['a']),
        3,
        dict(optimizer=None),
        dict(state, param_name='fused'),
    ):
        with pytest.raises(CheckpointMismatchError, match='MultiStepLR'):
            scheduler.load_state_dict(case)


RESTARTS = dict(periods=[3, 3], restart_weights=[1, 0.5], eta_min=0)
SCHEDULERS = {
    'Constant': {},
    'CosineAnnealing': dict(T_max=9),
    'Exponential': dict(gamma=0.5),
    'Linear': {},
    'Poly': {},
    'MultiStep': dict(milestones=[2, 4]),
    'Step': dict(step_size=2),
    'CosineRestart': RESTARTS,
    'ReduceOnPlateau': dict(monitor='a'),
}


@pytest.mark.parametrize(
    'name',
    [f'{name}{kind}' for name in SCHEDULERS for kind in ('LR', 'Momentum')]
    + ['OneCycleLR'],
)
def test_every_scheduler_of_mmengine_resumes(name, tmp_path):
    def make():
        settings = SCHEDULERS.get(
            name.removesuffix('LR').removesuffix('Momentum'),
            dict(eta_max=0.1, total_steps=9),
        )
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        return PARAM_SCHEDULERS.get(name)(
            OptimWrapper(
                torch.optim.SGD(
                    [dict(params=params[:1]), dict(params=params[1:], lr=0.2)],
                    lr=0.1,
                    momentum=0.9,
                )
            ),
            **settings,
        )

    stepped, fresh = make(), make()
    for _ in range(4):
        stepped.step(*([dict(a=1.0)] if 'Plateau' in name else []))
    torch.save(dict(x=stepped.state_dict()), tmp_path / 'a.pth')
    fresh.load_state_dict(read_checkpoint(tmp_path / 'a.pth')['x'])
    assert fresh.state_dict() == stepped.state_dict()


STOCK = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
assert not any(name.startswith('convnext_mm') for name in sys.modules)
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir = sys.argv[2]
cfg.load_from, cfg.resume = sys.argv[3], sys.argv[4] == 'resume'
cfg.custom_hooks = []
try:
    Runner.from_cfg(cfg).train()
except Exception as error:
    print('outcome:', type(error).__name__)
else:
    print('outcome: trained')
"""
INFER = """
import sys
from mmdet.apis import DetInferencer, init_detector
assert not any(name.startswith('convnext_mm') for name in sys.modules)
for call in (lambda: init_detector(sys.argv[1], sys.argv[3], device='cpu'),
             lambda: DetInferencer(sys.argv[2], sys.argv[3], 'cpu'),
             lambda: DetInferencer(None, sys.argv[3], 'cpu')):
    try:
        call()
        print('outcome: loaded')
    except Exception as error:
        print('outcome:', type(error).__name__)
"""


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    pytest.importorskip('mmdet')
    doors = pytest.importorskip('doors')
    folder = tmp_path_factory.mktemp('world')
    subprocess.run(
        [warm_python(), '-W', 'ignore', doors.__file__, str(folder)],
        input='',
        check=True,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # What a config has to say for inferencers, which read weights first.
    cfg = Config.fromfile(folder / 'detector.py')
    cfg.custom_imports = dict(imports=['convnext_mm'])
    cfg.dump(folder / 'importing.py')
    return folder


def run_alone(program, *args):
    result = subprocess.run(
        [warm_python(), '-W', 'ignore', '-c', program, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    return [
        line[9:] for line in result.stdout.splitlines() if line.startswith('outcome:')
    ] or result.stderr


def read_as(outcome: str) -> str:
    """What comes of a pickle without orders: all are refused where PyTorch cannot
    read them safely."""
    return outcome if at_least(SAFE_TORCH) else 'UnsafeCheckpointError'


def with_orders(world, tmp_path, flat=False):
    """A valid run whose strings act where they are run; ``flat``: its weights
    beside them, as MMEngine takes them, too."""
    run = torch.load(world / 'checkpoints.pth', weights_only=False)['detector']
    run['meta'].update(config=PAYLOAD, cfg=PAYLOAD)
    run['message_hub']['runtime_info'].update(cfg=PAYLOAD)
    if flat:
        run.update(run.pop('state_dict'))
    torch.save(run, tmp_path / 'orders.pth')
    return tmp_path / 'orders.pth'


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['load', 'resume'])
def test_stock_runner(mode, world, tmp_path, evil, canary):
    """With no import but MMEngine's of a type in the config."""
    config = world / 'detector.py'
    assert run_alone(STOCK, config, tmp_path, evil, mode) == ['UnsafeCheckpointError']
    for flat in (False, True):
        orders = with_orders(world, tmp_path, flat)
        assert run_alone(STOCK, config, tmp_path, orders, mode) == [read_as('trained')]
        assert not canary.exists()


@pytest.mark.slow
def test_stock_inferencers(world, tmp_path, evil, canary):
    configs = world / 'detector.py', world / 'importing.py'
    assert run_alone(INFER, *configs, evil) == 2 * ['UnsafeCheckpointError'] + [
        'CheckpointFileError'
    ]
    orders = with_orders(world, tmp_path)
    assert run_alone(INFER, *configs, orders) == [
        read_as('loaded'),
        read_as('loaded'),
        'CheckpointFileError',
    ]
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['nested', 'flat'])
def test_the_orders_would_act(mode, world, tmp_path, canary):
    """The control: MMEngine alone runs them, and deletes what they name."""
    orders = with_orders(world, tmp_path, flat=mode == 'flat')
    program = STOCK.replace(
        'Runner.from_cfg(cfg)',
        """
import convnext_mm
from convnext_mm.checkpoint import gate
from mmengine.runner import checkpoint
checkpoint.CheckpointLoader.load_checkpoint = staticmethod(
    lambda name, *args, **kwargs: __import__('torch').load(
        name, weights_only=False))
runner = Runner.from_cfg(cfg)
runner""".replace('\n', '\n    '),
    )
    run_alone(program, world / 'detector.py', tmp_path / 'a', orders, 'resume')
    assert canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_paths_in_a_checkpoint_are_not_deleted(kind, world, tmp_path):
    run = torch.load(world / 'checkpoints.pth', weights_only=False)['detector']
    victim = tmp_path / 'victim'
    victim.mkdir()
    (victim / 'file').touch()
    run['message_hub']['runtime_info'].update(
        best_ckpt=str(victim / 'file' if kind == 'file' else victim), best_score=-1.0
    )
    run['message_hub']['resumed_keys'].update(best_ckpt=True, best_score=True)
    path = tmp_path / 'run.pth'
    torch.save(run, path)
    work_dir = tmp_path / 'work'
    resume_run(world, work_dir, path).check_returncode()
    assert list(work_dir.glob('best_*.pth'))
    assert (victim / 'file').exists()


@pytest.mark.slow
def test_the_best_checkpoint_is_replaced_after_a_resume(world, tmp_path):
    """Found in the work folder; later ones and others' stay."""
    run = torch.load(world / 'checkpoints.pth', weights_only=False)['detector']
    run['message_hub']['runtime_info'].update(best_score=-1.0)
    run['message_hub']['resumed_keys'].update(best_score=True)
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    torch.save(run, work_dir / 'iter_1.pth')
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_1.pth'))
    for name in (
        'best_coco_bbox_mAP_iter_1.pth',
        'best_of_mine.pth',
        'best_coco_bbox_mAP_iter_7.pth',
        'best_coco_bbox_mAP_iter_1-12345678.pth',
    ):
        (work_dir / name).touch()
    resume_run(world, work_dir).check_returncode()
    assert {path.name for path in work_dir.glob('best_*')} == {
        'best_coco_bbox_mAP_iter_2.pth',
        'best_of_mine.pth',
        'best_coco_bbox_mAP_iter_7.pth',
        'best_coco_bbox_mAP_iter_1-12345678.pth',
    }


def run_tool(name, *args, **options):
    # What is set for a process before it starts does not reach a warm one.
    python = sys.executable if 'preexec_fn' in options else warm_python()
    return subprocess.run(
        [python, '-W', 'ignore', f'tools/{name}.py', *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def resume_run(world, work_dir, *checkpoint):
    if not at_least(SAFE_TORCH):
        pytest.skip(f'PyTorch below {SAFE_TORCH} does not resume: a run is a pickle')
    return run_tool(
        'train',
        world / 'detector.py',
        '--work-dir',
        work_dir,
        '--resume',
        *checkpoint,
        '--cfg-options',
        'custom_hooks=[]',
    )


def special_files(folder):
    os.mkfifo(folder / 'pipe')
    (folder / 'empty.pth').touch()
    return {
        folder / 'pipe': 'not a regular file',
        folder: 'is a directory',
        folder / 'empty.pth': 'is empty',
        folder / 'missing.pth': 'no such file',
        '~nosuchuser/x.pth': 'home',
    }


@pytest.mark.parametrize('tool', ['train', 'test', 'convert_checkpoint'])
def test_tools_say_what_a_path_is(tool, world, tmp_path, capsys):
    """In one line; a pipe is not waited for."""
    for path, reason in special_files(tmp_path).items():
        args = dict(
            train=[world / 'detector.py', '--resume', path],
            test=[world / 'detector.py', path],
            convert_checkpoint=[path, tmp_path / 'x.pth'],
        )[tool]
        try:
            status = load_tool(tool).main(list(map(str, args)))
        except SystemExit as error:
            status, message = 1, error.code
        else:
            message = capsys.readouterr().err.strip()
        assert status == 1 and message.startswith('error: ')
        sentence, more = message.splitlines()
        assert reason in sentence and more.startswith('More: docs/')


@pytest.mark.slow
def test_resume_of_weights_says_so(world, tmp_path):
    content = torch.load(world / 'checkpoints.pth', weights_only=False)
    torch.save(dict(state_dict=content['detector']['state_dict']), tmp_path / 'a.pth')
    result = resume_run(world, tmp_path, tmp_path / 'a.pth')
    assert result.returncode == 1
    *_, last, more = result.stderr.strip().splitlines()
    assert last.startswith('error: ') and 'leave out --resume' in last
    assert more == f'More: {address_of(CheckpointFileError())}'


@pytest.mark.slow
def test_names_that_are_no_unicode(tmp_path, weights):
    path = os.fsencode(tmp_path) + b'/caf\xe9.pth'
    with open(path, 'wb') as file:
        file.write(zipped(weights))
    state = convnext_mm.load_checkpoint(os.fsdecode(path))
    assert state.keys() == weights.keys()
    result = run_tool('convert_checkpoint', os.fsdecode(path), tmp_path / 'b.pth')
    assert result.returncode == 0 and 'caf\\udce9' in result.stdout


@pytest.mark.slow
def test_convert_to_safetensors_of_tensors_that_share_memory(tmp_path, weights):
    flat = torch.cat([t.flatten() for t in weights.values()])
    parts = flat.split([t.numel() for t in weights.values()])
    views = {k: part.view(t.shape) for (k, t), part in zip(weights.items(), parts)}
    views['stages.1.0.norm.bias'] = views['stages.1.1.norm.bias']
    torch.save(views, tmp_path / 'a.pth')
    for suffix in ('safetensors', 'pth'):
        target = tmp_path / f'b.{suffix}'
        result = run_tool('convert_checkpoint', tmp_path / 'a.pth', target)
        assert result.returncode == 0, result.stderr
        state = convnext_mm.load_checkpoint(target)
        assert all(torch.equal(state[key], views[key]) for key in views)


@pytest.mark.slow
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_convert_to_a_full_disk(suffix, tmp_path, weights):
    save_file(weights, tmp_path / 'a.safetensors')
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = run_tool(
        'convert_checkpoint',
        tmp_path / 'a.safetensors',
        tmp_path / f'b.{suffix}',
        preexec_fn=limit,
    )
    assert result.returncode == 1
    # Before it MMEngine may warn of an old PyTorch.
    *before, last, more = result.stderr.strip().splitlines()
    assert last.startswith('error: ') and 'cannot be written' in last
    assert more == f'More: {address_of(CheckpointWriteError())}'
    assert not any('Error' in line for line in before)
    assert [path.name for path in tmp_path.iterdir()] == ['a.safetensors']


@pytest.mark.slow
def test_configs_of_ours_import_the_gate():
    """Inferencers read weights before they build what would import it."""
    paths = [
        path for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts
    ]
    for path in paths:
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except ModuleNotFoundError:  # of a base: MMRotate, MMPose
            continue
        assert cfg.custom_imports.imports == ['convnext_mm'], path


def test_average_without_a_backbone_is_refused(arch):
    from mmengine.model import ExponentialMovingAverage

    average = ExponentialMovingAverage(Model(arch))
    state = {
        key: tensor
        for key, tensor in average.state_dict().items()
        if 'backbone' not in key
    }
    with pytest.raises(CheckpointError, match='no weights'):
        average.load_state_dict(state, strict=False)
