"""What `convnext-mm show` says and draws."""

import copy
import json
import math
import warnings

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from convnext_mm.analysis.complexity import build_model, measure
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.apis.show import (
    build_backbone,
    describe,
    draw_feature_maps,
    draw_runs,
    draw_samples,
    draw_schedule,
    effective_receptive_fields,
    feature_maps,
    load_weights,
    read_run,
    receptive_fields_of,
    schedule_of,
    write_samples,
)
from convnext_mm.apis.show import samples as show_samples
from convnext_mm.apis.show.backbone import stride_of
from convnext_mm.apis.show.learning_rate import count_epoch, ranges, summarise
from convnext_mm.archs import STEPS
from convnext_mm.cli import main
from convnext_mm.datasets import write_shapes
from convnext_mm.engine.errors import ConfigError
from recipe_models import learning_rates, load, optim_wrapper_of, recipe, stand_in
from repo import ROOT, SHAPES
from toy_runs import Fault, Killed, kill, make
from toys import ARCH, detector, segmentor

LAYER_DECAY = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.5, num_layers=6),
)
SIZE = (160, 224)


def config(scope='mmseg', model=segmentor, optim_wrapper=LAYER_DECAY, **backbone):
    pytest.importorskip(scope)
    settings = backbone
    if 'type' not in backbone:
        settings = dict(type='convnext_mm.ConvNeXt', arch=ARCH, **backbone)
    return Config(
        dict(
            default_scope=scope,
            model=model(settings),
            optim_wrapper=optim_wrapper,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=100),
            param_scheduler=dict(type='LinearLR', by_epoch=False, begin=0, end=10),
        )
    )


def bare(**backbone):
    """A config of a backbone alone."""
    settings = backbone
    if 'type' not in backbone:
        settings = dict(type='convnext_mm.ConvNeXt', arch=ARCH, **backbone)
    return Config(dict(default_scope='mmengine', model=dict(backbone=settings)))


def is_picture(path):
    image = cv2.imread(str(path))
    return image is not None and image.std() > 1


# --- show backbone


@pytest.mark.slow
def test_stages_add_up_to_the_backbone():
    cfg = config('mmdet', detector)
    stages = describe(cfg, SIZE).stages
    whole = measure(cfg, SIZE)['backbone']
    assert sum(stage.params for stage in stages) == whole.params
    assert sum(stage.flops for stage in stages) == whole.flops
    assert [stage[1:4] for stage in stages] == [
        (channels, depth, 4 * 2**i)
        for i, (channels, depth) in enumerate(zip(ARCH['channels'], ARCH['depths']))
    ]


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(use_grn=True),
        dict(impl='eager'),
        dict(frozen_stages=1),
        dict(with_cp=True),
        dict(out_indices=(1, 2), drop_path_rate=0.5),
        dict(out_indices=3, gap_before_final_norm=True),
    ],
)
def test_kept_memory_is_that_of_the_size(settings):
    """Measured on small squares, it is what the whole backbone keeps for a larger
    image."""
    cfg = bare(**settings)
    stages = describe(cfg, SIZE).stages
    backbone = build_backbone(cfg, 'cpu')
    whole = saved_bytes(lambda: backbone(torch.zeros(1, 3, *SIZE)), backbone)
    assert sum(stage.saved_bytes for stage in stages) == whole


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_strides_and_shapes(output_stride):
    cfg = bare(output_stride=output_stride)
    backbone = build_backbone(cfg, 'cpu')
    maps = backbone(torch.zeros(1, 3, *SIZE))
    stages = describe(cfg, SIZE).stages
    assert [stage.shape for stage in stages] == [tuple(m.shape[2:]) for m in maps]
    assert [s.stride * s.shape[0] for s in stages] == [SIZE[0]] * 4
    assert [stride_of(backbone, i) for i in range(4)] == [s.stride for s in stages]


def test_layers_train_as_the_optimizer_says():
    """Every parameter's scale is its group's learning rate over the base."""
    wrapper = copy.deepcopy(LAYER_DECAY)
    wrapper['paramwise_cfg']['custom_keys'] = {'stages.1.1': dict(lr_mult=0.1)}
    cfg = config(optim_wrapper=wrapper, frozen_stages=1)
    found = {layer.name: layer for layer in describe(cfg, SIZE).layers}
    assert [*found] == [
        'stem',
        'stage 1 block 1',
        'downsampling 2',
        'stage 2 block 1',
        'stage 2 block 2',
        'downsampling 3',
        'stage 3 block 1',
        'downsampling 4',
        'stage 4 block 1',
        'output norms',
    ]
    assert found['stem'].lr_scales == found['stage 1 block 1'].lr_scales == ()
    assert found['stage 2 block 1'][1:3] == (2, (0.5**5,))
    assert found['stage 2 block 2'][1:3] == (2, (0.1 * 0.5**5,))
    assert found['output norms'][1:3] == (7, (1.0,))
    backbone = build_backbone(cfg)
    assert sum(layer.params for layer in found.values()) == sum(
        p.numel() for p in backbone.parameters()
    )


@pytest.mark.parametrize(
    'optim_wrapper, sentence',
    [
        (dict(optimizer=LAYER_DECAY['optimizer']), 'has no decay_rate'),
        ({**LAYER_DECAY, 'paramwise_cfg': dict(decay_rate=1.0)}, 'decay_rate=1'),
        (None, 'no optim_wrapper'),
    ],
)
def test_without_layer_decay(optim_wrapper, sentence):
    description = describe(config(optim_wrapper=optim_wrapper), SIZE)
    assert sentence in description.layer_decay
    assert {layer.lr_scales for layer in description.layers} <= {(1.0,)}


@pytest.mark.parametrize(
    'cfg, message',
    [
        (
            dict(model=dict(backbone=dict(type='mmdet.ResNet', depth=50))),
            'mmdet.ResNet',
        ),
        (dict(model=dict(type='X')), 'type is None'),
        ({}, 'type is None'),
        (dict(model=dict(backbone=dict(type='convnext_mm.ConvNeXt', arch='x'))), "'x'"),
    ],
)
def test_another_backbone(cfg, message):
    pytest.importorskip('mmdet')
    with pytest.raises(ConfigError, match=message):
        build_backbone(Config(dict(cfg, default_scope='mmdet')))


def test_an_image_that_is_too_small():
    with pytest.raises(ConfigError, match='--shape 16 64 is too small.* at least 32'):
        describe(bare(), (16, 64))


ISOTROPIC = dict(
    type='convnext_mm.IsotropicConvNeXt', arch=dict(depth=3, channels=16), patch_size=8
)
STEP = dict(
    type='convnext_mm.ModernizedResNet', depths=[1, 2, 2, 1], width_multiplier=0.125
)
OTHERS = [
    ISOTROPIC,
    dict(ISOTROPIC, frozen_stages=1, gap_before_final_norm=True),
    *(dict(STEP, step=step) for step in STEPS),
    dict(STEP, step='resnet', norm_eval=True, frozen_stages=1),
    dict(STEP, step='fewer norms', drop_path_rate=0.5, out_indices=(1, 2)),
]


@pytest.mark.parametrize('settings', OTHERS, ids=str)
def test_other_networks_of_the_package(settings):
    """Stages, and what training keeps of them, are those of the whole network."""
    cfg = bare(**settings)
    stages = describe(cfg, SIZE).stages
    backbone = build_backbone(cfg, 'cpu').train()
    for module in backbone.modules():
        if hasattr(module, 'drop_path'):
            module.drop_path = 0.0
    x = torch.zeros(1, 3, *SIZE)
    assert sum(stage.saved_bytes for stage in stages) == saved_bytes(
        lambda: backbone(x), backbone
    )
    assert sum(s.params for s in stages) == sum(
        p.numel() for p in backbone.parameters()
    )
    assert [s.stride * s.shape[0] for s in stages] == [SIZE[0]] * len(stages)


@pytest.mark.parametrize(
    'settings',
    [
        dict(ISOTROPIC, layer_scale_init_value=1.0),
        dict(STEP, step='resnet'),
        dict(STEP, step='patchify stem'),
        dict(STEP, step='kernel size 7'),
        dict(STEP, step='separate downsampling', layer_scale_init_value=1.0),
    ],
    ids=str,
)
def test_fields_lie_around_their_centers(settings):
    """What a position sees begins and ends as far from its centre."""
    settings = dict(settings, out_norm=False)
    if settings['type'].endswith('ResNet'):
        settings.update(out_indices=(0, 1))
    torch.manual_seed(0)
    backbone = build_backbone(bare(**settings), 'cpu')
    for field in receptive_fields_of(backbone, (256, 256), num_inputs=2):
        for axis, center in zip((1, 0), field.center):
            seen = field.field.any(axis).nonzero().flatten()
            before, after = center - seen[0].item(), seen[-1].item() - center
            assert before == after


def test_layers_of_other_networks():
    iso = describe(config(**ISOTROPIC), SIZE).layers
    assert [layer.name for layer in iso][:2] == ['stem', 'stage 1 block 1']
    step = describe(config(**dict(STEP, step='resnet')), SIZE).layers
    assert step[0].name == 'stem' and step[-1].name == 'stage 4 block 1'
    for layers in (iso, step):
        assert all(layer.layer_id is not None for layer in layers)


@pytest.mark.parametrize('kernel, stride', [(7, 1), (8, 4), (2, 2)])
def test_the_field_of_a_convolution_is_its_kernel(kernel, stride):
    """Ones see a square with equal weight, and nothing beyond it."""
    conv = nn.Conv2d(3, 1, kernel, stride, padding=(kernel - stride) // 2, bias=False)
    nn.init.ones_(conv.weight)
    (field,) = effective_receptive_fields(
        lambda x: [conv(x)], (48, 64), [stride], num_inputs=2
    )
    seen = field.field > 0
    assert seen.sum() == kernel**2
    assert field.field[seen].std() < 1e-9
    assert field.field.sum().item() == pytest.approx(1)
    rows = seen.any(1).nonzero()
    assert field.center[0] == (rows[0] + rows[-1]).item() / 2
    sides = range(kernel % 2 or 2, kernel + 1, 2)
    assert field.sides == tuple(
        next(s for s in sides if s**2 >= fraction * kernel**2)
        for fraction in (0.5, 0.9, 0.99)
    )


def test_fields_grow_and_leave_the_backbone_as_it_was():
    """Also behind the output norms, where the plain sum of channels is constant."""
    backbone = build_backbone(
        bare(layer_scale_init_value=1.0, out_indices=(0, 2)), 'cpu'
    )
    fields = receptive_fields_of(backbone, (128, 128), num_inputs=2)
    assert [field.stage for field in fields] == [1, 3]
    assert fields[0].sides[0] < fields[1].sides[0]
    # Stem, one block: 4 pixels, and 3 positions to both sides.
    assert fields[0].sides[2] <= 28 < fields[1].sides[2]
    assert all(p.requires_grad and p.grad is None for p in backbone.parameters())


@pytest.mark.slow
def test_feature_maps_are_those_of_the_normalised_image(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    cfg = bare(layer_scale_init_value=1.0)
    mean, std = [10.0, 20.0, 30.0], [2.0, 3.0, 4.0]
    cfg.model.data_preprocessor = dict(mean=mean, std=std, bgr_to_rgb=True)
    backbone = build_backbone(cfg, 'cpu')
    features = feature_maps(backbone, cfg, str(tmp_path / 'image.png'), (64, 96))
    x = torch.from_numpy((image[..., ::-1] - np.array(mean)) / std).float()
    x = x.permute(2, 0, 1)[None]
    for i, (stage, found) in enumerate(zip(backbone.stages, features.maps)):
        x = stage(backbone.downsample_layers[i](x))
        torch.testing.assert_close(found, x[0])
    assert (features.image == image[..., ::-1]).all()
    assert is_picture(draw_feature_maps(features, tmp_path / 'features.png'))


def test_pooled_features_have_no_field():
    backbone = build_backbone(bare(gap_before_final_norm=True, out_indices=3), 'cpu')
    with pytest.raises(ConfigError, match='gap_before_final_norm=False'):
        receptive_fields_of(backbone, (64, 64))


@pytest.mark.parametrize('content', [None, b'no picture'])
def test_an_image_that_cannot_be_read(content, tmp_path):
    path = tmp_path / 'image.png'
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match='no picture that can be read'):
        feature_maps(build_backbone(bare(), 'cpu'), bare(), str(path), (64, 64))


def test_weights_of_a_checkpoint(tmp_path):
    source = build_backbone(bare(), 'cpu')
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    backbone = build_backbone(bare(), 'cpu')
    said = load_weights(backbone, str(tmp_path / 'weights.pth'))
    assert said == 'weights of weights.pth'
    for ours, theirs in zip(backbone.parameters(), source.parameters()):
        assert torch.equal(ours, theirs)
    assert load_weights(backbone, None) == 'initial weights'


# --- show lr


@pytest.mark.slow
@pytest.mark.parametrize('words', [('upernet', 'large-in22k'), ('mask_rcnn', '-t_fpn')])
def test_rates_are_those_of_the_optimizer(words):
    """Every group's, in every iteration that is looked at."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    path, epoch_length = recipe(*words), 20
    cfg = load(path)
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.max_iters = 720
    schedule = schedule_of(cfg, epoch_length)
    groups = optim_wrapper_of(path).optimizer.param_groups
    initial = [group['lr'] for group in groups]
    optimizer = stand_in(initial)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the optimizer itself does not step
        seen = learning_rates(cfg, optimizer, epoch_length, 720, schedule.iterations)
    group_of = {group.scale: group for group in schedule.groups}
    base = cfg.optim_wrapper.optimizer.lr
    assert schedule.num_iterations == 720
    assert len(group_of) == len(set(initial))
    for number, rate in enumerate(initial):
        group = group_of[rate / base]
        theirs = [rates[number] for rates in seen.values()]
        np.testing.assert_allclose(group.rates, theirs, rtol=1e-12)
        assert group.start == group.rates[0] and group.end == group.rates[-1]
        assert group.peak == group.rates.max()
    assert sum(group.params for group in schedule.groups) == sum(
        p.numel() for group in groups for p in group['params']
    )


def test_groups_say_what_they_hold(tmp_path):
    schedule = schedule_of(config())
    assert [(g.name, g.layers, g.scale) for g in schedule.groups] == [
        ('layer 0', 'stem', 0.5**7),
        ('layer 1', 'stage 1', 0.5**6),
        ('layer 2', 'downsampling 2, stage 2', 0.5**5),
        ('layer 3', 'downsampling 3, stage 3', 0.5**4),
        ('layer 6', 'downsampling 4, stage 4', 0.5),
        ('layer 7', 'decode_head, output norms', 1.0),
    ]
    assert schedule.groups[-1].start == pytest.approx(1e-3 / 3)
    assert schedule.groups[-1].end == schedule.groups[-1].peak == pytest.approx(1e-3)
    assert is_picture(draw_schedule(schedule, tmp_path / 'lr.png', 'a title'))


def test_a_constant_rate_of_all_layers():
    cfg = config(optim_wrapper=dict(optimizer=LAYER_DECAY['optimizer']))
    cfg.param_scheduler = None
    (group,) = schedule_of(cfg).groups
    assert (group.layers, group.start, group.end) == ('all layers', 1e-3, 1e-3)


@pytest.mark.parametrize(
    'words, iterations',
    [
        (('mask_rcnn', 'convnext-t_fpn'), 7330),  # as published runs log it
        (('imagenet', 'tiny_32xb128_in1k'), 312),  # whole batches of 4096
    ],
)
def test_epochs_of_published_data(words, iterations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert count_epoch(load(recipe(*words))) == iterations


def by_epoch(*extra):
    cfg = config()
    cfg.train_cfg = dict(by_epoch=True, max_epochs=10)
    cosine = dict(type='CosineAnnealingLR', by_epoch=True, T_max=10, begin=0)
    cfg.param_scheduler = [cosine, *extra]
    return cfg


def test_epochs_without_data():
    """The axis is epochs where only epochs are counted; else the length is asked."""
    schedule = schedule_of(by_epoch())
    assert schedule.epochs_only
    assert schedule.num_iterations == 10 * schedule.epoch_length
    group = schedule.groups[-1]
    expected = 1e-3 * (1 + math.cos(math.pi * 9 / 10)) / 2
    assert group.end == pytest.approx(expected)
    warmup = dict(type='LinearLR', by_epoch=False, begin=0, end=20)
    with pytest.raises(ConfigError, match='give --epoch-length N'):
        schedule_of(by_epoch(warmup))
    schedule = schedule_of(by_epoch(warmup), 7)
    assert (schedule.num_iterations, schedule.epochs_only) == (70, False)


@pytest.mark.slow
def test_epochs_of_data_that_is_there(tmp_path):
    pytest.importorskip('mmdet')
    write_shapes(str(tmp_path), 5, 1, 64)
    cfg = by_epoch()
    cfg.merge_from_dict(dict(train_dataloader=shapes_of(tmp_path, 'detection')))
    assert count_epoch(cfg) == 3  # of 5 images, 2 at once
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=4)
    assert count_epoch(cfg) == 2  # in 2 processes
    cfg.train_dataloader.drop_last = True
    assert count_epoch(cfg) == 1


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(train_cfg=None), 'needs optim_wrapper and train_cfg'),
        (dict(optim_wrapper=None), 'needs optim_wrapper and train_cfg'),
        (dict(optim_wrapper=dict(a=1)), 'optim_wrapper.optimizer is missing'),
        (dict(optim_wrapper=dict(optimizer=dict(type='Adamm'))), 'optim_wrapper: '),
        (dict(param_scheduler=dict(type='LinearRL')), 'LinearRL'),
    ],
)
def test_configs_without_a_learning_rate(change, message):
    cfg = config()
    for key, value in change.items():
        cfg[key] = value
    with pytest.raises(ConfigError, match=message):
        schedule_of(cfg)


def test_short_lists():
    assert ranges([1, 2, 3, 7]) == '1-3, 7'
    names = [f'backbone.stages.2.{i}.gamma' for i in range(4)]
    assert summarise([*names[:1], *names[2:]], names) == 'stage 3 blocks 1, 3-4'
    assert summarise(names, names) == 'stage 3'
    more = ['backbone.norm1.bias', 'neck.a']
    assert summarise(more, [*names, *more]) == 'output norms, neck'


# --- show run


def train(step, loss, **more):
    return dict(lr=1e-3, loss=loss, time=0.5, iter=step, step=step, **more)


def write(folder, *starts):
    for number, start in enumerate(starts):
        path = folder / f'2026010{number}_000000' / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text(
            ''.join(s if isinstance(s, str) else json.dumps(s) + '\n' for s in start)
        )
    return folder


def test_a_resumed_run_is_one(tmp_path):
    """What was made again counts once, the later one."""
    folder = write(
        tmp_path,
        [
            train(10, 5.0),
            train(20, 4.0),
            dict(mIoU=30.0, time=9.0, step=20),
            train(30, 3.0),
            train(40, 99.0),
            dict(mIoU=99.0, step=40),
        ],
        [train(30, 3.5), train(40, 2.0), dict(mIoU=25.0, step=40)],
        [train(50, 1.0, memory=7)],
    )
    run = read_run(folder)
    losses = [(10, 5.0), (20, 4.0), (30, 3.5), (40, 2.0), (50, 1.0)]
    assert run.training['loss'] == losses
    assert run.metrics == dict(mIoU=[(20, 30.0), (40, 25.0)])
    assert run.best('mIoU') == (25.0, 30.0, 20)
    assert (run.iterations, run.last_loss, run.seconds) == (50, 1.0, 0.5)
    assert (run.max_memory, run.attempts, run.unreadable) == (7, 3, 0)


def test_evaluations_by_epoch_belong_to_iterations(tmp_path):
    folder = write(
        tmp_path,
        [
            train(50, 3.0),
            train(100, 2.0),
            dict(acc=1.0, step=1),
            train(150, 2.0),
            train(200, 2.0),
            dict(acc=9.0, step=2),
        ],
        [train(150, 1.0), train(200, 0.5), dict(acc=2.0, step=2)],
    )
    assert read_run(folder).metrics == dict(acc=[(100, 1.0), (200, 2.0)])


def test_faults_of_logs(tmp_path):
    """A line that was cut off, NaN, names with their mode in front, COCO's -1."""
    folder = write(
        tmp_path,
        [
            {'train/lr': 1.0, 'train/loss': 2.0, 'step': 1},
            '{"lr": 0.1, "lo{"lr": 1}\n',
            train(2, math.nan),
            {'val/coco/mAP': math.nan, 'val/coco/mAP_s': -1, 'val/x': 'a', 'step': 2},
            train(3, 1.0),
            {'val/coco/mAP': 0.5, 'val/coco/mAP_s': -1, 'step': 3},
            {'val/coco/mAP': math.nan, 'val/coco/mAP_s': -1, 'step': 3},
            '{"lr": 0.',
        ],
        [],
    )
    run = read_run(folder)
    assert run.training['loss'][0] == (1, 2.0)
    assert (run.unreadable, run.attempts, run.last_loss) == (2, 1, 1.0)
    assert [*run.metrics] == ['coco/mAP']
    last, best, iteration = run.best('coco/mAP')
    assert math.isnan(last) and (best, iteration) == (0.5, 3)
    assert run.best('coco/mAP_s') is None
    assert is_picture(draw_runs([run], tmp_path / 'run.png'))


def test_the_best_loss_is_the_lowest(tmp_path):
    evaluations = [dict(loss_val=v, step=s) for s, v in enumerate([3.0, 1.0, 2.0])]
    run = read_run(write(tmp_path, [train(1, 1.0), *evaluations]))
    assert run.best('loss_val')[:2] == (2.0, 1.0)


def test_runs_of_different_metrics_in_one_picture(tmp_path):
    one = write(tmp_path / 'one', [train(1, 1.0), dict(mIoU=1.0, step=1)])
    other = write(
        tmp_path / 'other', [train(1, 1.0), dict(mAP=1.0, mAP_50=2.0, step=1)]
    )
    picture = draw_runs([read_run(one), read_run(other)], tmp_path / 'runs.png')
    assert is_picture(picture)


@pytest.mark.parametrize(
    'make_folder, message',
    [
        (lambda path: path / 'missing', "missing' is no folder"),
        (lambda path: path, 'has no record in TIMESTAMP/vis_data/scalars.json'),
        (lambda path: write(path, []), 'has no record'),
        (lambda path: write(path, ['{"lr": 0.']), 'has no record'),
        (lambda path: write(path, ['[1]\n', '3\n']), 'has no record'),
    ],
)
def test_folders_without_a_run(make_folder, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_run(make_folder(tmp_path))


def logged(folder, fault=None, **settings):
    make(
        folder,
        fault,
        scores={4: 0.1, 8: 0.3, 11: 0.2},
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)
        ),
        log_processor=dict(by_epoch=False, window_size=1),
        **settings,
    ).train()


@pytest.mark.slow
def test_a_killed_and_resumed_run_reads_as_an_undisturbed_one(tmp_path):
    logged(tmp_path / 'straight')
    with pytest.raises(Killed):
        logged(tmp_path / 'killed', Fault(6, kill))
    first = next((tmp_path / 'killed').glob('*/vis_data')).parent
    first.rename(tmp_path / 'killed' / '20000101_000000')
    logged(tmp_path / 'killed', resume=True)
    straight, killed = (read_run(tmp_path / name) for name in ('straight', 'killed'))
    assert killed.attempts == 2
    assert [i for i, _ in killed.training['loss']] == [*range(1, 12)]
    for name in ('loss', 'lr'):
        assert killed.training[name] == straight.training[name]
    assert killed.metrics == straight.metrics
    assert killed.best('score') == (0.2, 0.3, 8)


# --- show data


def shapes_of(root, task, *before):
    """A dataloader of drawn shapes; transforms ``before`` annotations are loaded."""
    kind = 'Det' if task == 'detection' else 'Seg'
    load = dict(with_bbox=True, with_mask=True) if kind == 'Det' else {}
    keys = ('img_path', 'ori_shape', 'img_shape', 'flip')
    pipeline = [
        dict(type='LoadImageFromFile'),
        *before,
        dict(type='LoadAnnotations', **load),
        dict(type='RandomFlip', prob=0.0 if before else 0.5),
        dict(type=f'Pack{kind}Inputs', meta_keys=keys),
    ]
    scope = f'mm{kind.lower()}'
    dataset = dict(
        detection=dict(
            type='CocoDataset',
            ann_file='annotations/instances_training.json',
            data_prefix=dict(img='images/training/'),
            metainfo=dict(classes=('circle', 'triangle', 'square', 'star', 'cross')),
        ),
        segmentation=dict(
            type='BaseSegDataset',
            img_suffix='.png',
            data_prefix=dict(
                img_path='images/training', seg_map_path='annotations/training'
            ),
            metainfo=dict(
                classes=tuple('abcdef'), palette=[[40 * i] * 3 for i in range(6)]
            ),
        ),
    )[task]
    return dict(
        batch_size=2,
        dataset=dict(dataset, data_root=str(root), pipeline=pipeline, _scope_=scope),
    )


def data_config(root, task, *before):
    scope = 'mmdet' if task == 'detection' else 'mmseg'
    pytest.importorskip(scope)
    loader = shapes_of(root, task, *before)
    return Config(dict(default_scope=scope, train_dataloader=loader))


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    write_shapes(str(root), 5, 1, 64)
    return root


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_samples_are_drawn_and_written(task, shapes, tmp_path):
    cfg = data_config(shapes, task)
    samples = draw_samples(cfg, count=2, seed=1)
    picture = write_samples(samples, tmp_path / 'data_train', 'title')
    assert picture == tmp_path / 'data_train.png'
    assert is_picture(picture)
    assert len({sample.number for sample in samples}) == 2
    for sample in samples:
        plain = cv2.imread(str(shapes / 'images/training' / sample.title))
        alone = cv2.imread(str(tmp_path / f'data_train/{sample.number:06d}.png'))
        assert (alone[..., ::-1] == sample.picture).all()
        assert sample.picture.shape == (640, 640, 3)  # 10 times the image
        # Colours are right: outside of what is drawn the image is there.
        factor = sample.picture.shape[0] // 64
        large = plain.repeat(factor, 0).repeat(factor, 1)[..., ::-1]
        near = [
            np.abs(image.astype(int) - sample.picture).mean()
            for image in (large, large[:, ::-1], large[..., ::-1], large[:, ::-1, ::-1])
        ]
        assert min(near) == min(near[:2])
    again = draw_samples(cfg, count=2, seed=1)
    assert all((a.picture == b.picture).all() for a, b in zip(samples, again))
    other = draw_samples(cfg, count=9, seed=2)
    assert len(other) == 5
    assert [s.number for s in other[:2]] != [s.number for s in samples]


@pytest.mark.slow
@pytest.mark.parametrize('before', [(), (dict(type='Resize', scale=(96, 96)),)])
def test_boxes_lie_around_masks(before, shapes, monkeypatch):
    """Also where the pipeline resizes before it loads, as evaluation does."""
    pytest.importorskip('mmdet')
    drawn = []
    original = show_samples.draw_sample

    def note(image, sample, meta):
        drawn.append((image, sample.gt_instances.clone()))
        return original(image, sample, meta)

    monkeypatch.setattr(show_samples, 'draw_sample', note)
    draw_samples(data_config(shapes, 'detection', *before), count=5)
    assert len(drawn) == 5
    for image, instances in drawn:
        assert instances.masks.shape[1:] == image.shape[:2]
        for box, mask in zip(instances.bboxes, instances.masks):
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(box.numpy() - around).max() <= 2


@pytest.mark.slow
def test_class_maps_fit_a_resized_image(shapes):
    resize = dict(type='Resize', scale=(96, 96))
    samples = draw_samples(data_config(shapes, 'segmentation', resize), count=1)
    assert samples[0].picture.shape == (672, 672, 3)


@pytest.mark.slow
def test_a_pipeline_that_normalises_is_undone(shapes):
    cfg = data_config(shapes, 'segmentation')
    plain = draw_samples(cfg, count=2)
    normalise = dict(type='mmcv.Normalize', mean=[9, 8, 7], std=[2, 3, 4], to_rgb=True)
    cfg.train_dataloader.dataset.pipeline.insert(1, normalise)
    for ours, theirs in zip(draw_samples(cfg, count=2), plain):
        difference = np.abs(ours.picture.astype(int) - theirs.picture)
        assert difference.max() <= 1


@pytest.mark.slow
def test_classes_of_a_classifier(shapes, tmp_path):
    pytest.importorskip('mmpretrain')
    for name in ('cat', 'dog'):
        (tmp_path / name).mkdir()
        image = cv2.imread(str(shapes / 'images/training/00000.png'))
        cv2.imwrite(str(tmp_path / name / f'{name}.png'), image)
    dataset = dict(
        type='CustomDataset',
        data_prefix=str(tmp_path),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )
    cfg = Config(dict(default_scope='mmpretrain', val_dataloader=dict(dataset=dataset)))
    samples = draw_samples(cfg, 'val')
    assert sorted(s.title for s in samples) == ['cat.png: cat', 'dog.png: dog']


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(split='val'), r'no val_dataloader: take a --split .*\(train\)'),
        (dict(count=0), '--count must be at least 1, got 0'),
    ],
)
def test_samples_that_are_not_there(settings, message, tmp_path):
    cfg = data_config(tmp_path, 'segmentation')
    with pytest.raises(ConfigError, match=message):
        draw_samples(cfg, **settings)


# --- the commands


@pytest.mark.slow
def test_commands(shapes, tmp_path, capsys, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / SHAPES)
    image = str(shapes / 'images/training/00000.png')
    assert main(['show', 'backbone', path, '--shape', '64', '96']) == 0
    said = capsys.readouterr().out
    assert 'kept' in said and 'stage 3 blocks 1-3' in said and 'No layer decay' in said
    options = ['--image', image, '--erf', '--json', '--shape', '64', '96']
    assert main(['show', 'backbone', path, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    whole = measure(Config.fromfile(path), (64, 96))['backbone']
    assert sum(stage['flops'] for stage in facts['stages']) == whole.flops
    assert len(facts['receptive_fields']) == 4
    folder = 'work_dirs/mask-rcnn_convnext-atto_shapes/show'
    assert facts['pictures'] == [
        f'{folder}/features_00000.png',
        f'{folder}/receptive_fields.png',
    ]
    assert all(map(is_picture, facts['pictures']))

    assert main(['show', 'lr', path, '--out', 'lr']) == 0
    assert 'all layers' in capsys.readouterr().out
    assert is_picture('lr/learning_rate.png')

    options = ['--data-root', str(shapes), '--count', '2', '--out', 'data']
    assert main(['show', 'data', path, *options]) == 0
    assert 'data/data_train.png' in capsys.readouterr().out
    assert is_picture('data/data_train.png')

    run = write(tmp_path / 'run', [train(1, 1.5), dict(mIoU=40.5, step=1)])
    assert main(['show', 'run', str(run)]) == 0
    said = capsys.readouterr().out
    assert '40.5 (40.5, 1)' in said and 'last loss' in said
    assert is_picture('run/show/runs.png')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['run', 'missing'], "'missing' is no folder"),
        (['backbone', 'missing.py'], 'missing.py'),
        (
            ['lr', SHAPES, '--cfg-options', 'optim_wrapper.optimizer.type=Adam8'],
            'did you mean Adam',
        ),
        (['backbone', SHAPES, '--checkpoint', 'x.pth'], 'add --image FILE or --erf'),
        (['data', SHAPES, '--data-root', 'missing'], 'does not exist'),
    ],
)
def test_mistakes_end_with_a_sentence(arguments, message, tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    arguments = [str(ROOT / a) if a == SHAPES else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main(['show', *arguments])
    assert str(stop.value).startswith('error: ') and message in str(stop.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    run = read_run(write(tmp_path / 'run', [train(1, 1.5)]))
    with pytest.raises(ConfigError, match='give another folder with --out DIR'):
        draw_runs([run], tmp_path / 'file' / 'runs.png')


def test_the_model_of_a_description_is_that_of_training():
    """The optimizer that is shown is built for the whole model."""
    cfg = config()
    wrapper = build_optim_wrapper(build_model(cfg), copy.deepcopy(cfg.optim_wrapper))
    scales = {g['lr'] / 1e-3 for g in wrapper.optimizer.param_groups}
    shown = {s for layer in describe(cfg, SIZE).layers for s in layer.lr_scales}
    assert shown == scales
