"""The road from ResNet to ConvNeXt: its two ends, what each step costs, and what does
not go together."""

import copy
import json

import pytest
import torch
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import repo
from convnext_mm import CheckpointError, ConvNeXt, ModernizedResNet
from convnext_mm.archs import CHOICES, ROADMAP, STEPS, Decisions
from convnext_mm.models.modernized_resnet import RoadmapBlock

PAPER = json.loads((repo.ROOT / 'tests/data/paper_tables.json').read_text())['roadmap']
ROWS = [
    pytest.param(regime, row, id=f'{regime}-{row["step"]}')
    for regime in ROADMAP
    for row in PAPER[regime]
]
# Table 10 prints other figures than the layers of these two networks need, see
# docs/roadmap.md.
MISPRINTS = {
    ('resnet50', 'BN to LN'): '4.15',
    ('resnet50', 'separate downsampling'): '4.46',
}
NARROW = dict(width_multiplier=0.125, depths=[1, 2, 2, 1])


def narrow(step, regime='resnet50', seed=0, **settings):
    """A network of the step that a CPU computes at once, with statistics and layer
    scale that show."""
    torch.manual_seed(seed)
    model = ModernizedResNet(regime, step, **{**NARROW, **settings})
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
            if name.endswith('gamma'):
                value.fill_(0.5)
    return model


def cost_by_hand(d: Decisions) -> tuple[int, int]:
    """Parameters and multiply-adds at 224 x 224 of a classifier with 1000 classes,
    from nothing but arithmetic."""
    is_last = d.separate_downsampling
    bias = 0 if d.norm == 'BN' else 1
    size, patch = (56, 4) if d.stem == 'patchify' else (112, 7)
    macs = size * size * d.width * 3 * patch * patch
    params = d.width * (3 * patch * patch + bias) + 2 * d.width
    size, entering = 56, d.width
    for stage, depth in enumerate(d.depths):
        narrow_side = d.width * 2**stage
        out = narrow_side if d.bottleneck == 'inverted' else 4 * narrow_side
        hidden = 5 * narrow_side - out
        for block in range(depth):
            halves = stage > 0 and block == 0
            if halves and is_last:
                size //= 2
                macs += size * size * 4 * entering * out
                params += 2 * entering + (4 * entering + 1) * out
                entering, halves = out, False
            after = size // 2 if halves else size
            area, area_after = size * size, after * after
            taps = d.kernel_size**2
            if d.depthwise_position == 'first':
                convs = [(entering, entering, taps, True), (entering, hidden, 1, False)]
                areas = [area_after, area_after, area_after]
                norms = [entering, hidden, out]
            else:
                convs = [(entering, hidden, 1, False), (hidden, hidden, taps, True)]
                areas = [area, area_after, area_after]
                norms = [hidden, hidden, out]
            convs.append((hidden, out, 1, False))
            for i, (c_in, c_out, k, is_spatial) in enumerate(convs):
                weights = c_out * k * (1 if is_spatial and d.depthwise else c_in)
                macs += weights * areas[i]
                normed = i == 0 or d.num_norms == 3
                has_bias = not (normed and d.norm == 'BN')
                params += weights + c_out * has_bias + 2 * norms[i] * normed
            if is_last:
                params += out  # layer scale
            elif halves or entering != out:
                macs += area_after * entering * out
                params += entering * out + bias * out + 2 * out
            entering, size = out, after
    return params + 2 * entering * is_last + 1001 * 0 + (entering + 1) * 1000, (
        macs + entering * 1000
    )


@pytest.mark.slow
@pytest.mark.parametrize('regime, row', ROWS)
def test_costs_are_the_papers(regime, row):
    step = row['step']
    with torch.device('meta'):
        model = ModernizedResNet(
            regime, step, out_indices=3, gap_before_final_norm=True
        ).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (features,) = model(torch.rand(1, 3, 224, 224))
    classifier = 1000 * features.shape[1]
    params = sum(p.numel() for p in model.parameters()) + classifier + 1000
    flops = counter.get_total_flops() // 2 + classifier
    assert (params, flops) == cost_by_hand(ROADMAP[regime][step])
    printed = f'{row["gflops"]:.2f}'
    assert f'{flops / 1e9:.2f}' == MISPRINTS.get((regime, step), printed)


def test_the_steps_are_the_papers():
    for regime in ROADMAP:
        assert [row['step'] for row in PAPER[regime]] == list(ROADMAP[regime])
    assert len(STEPS) == 17


@pytest.mark.slow
@pytest.mark.parametrize('regime', ROADMAP)
@pytest.mark.parametrize('step', ['resnet', 'enhanced recipe'])
def test_the_first_step_is_torchvisions_resnet(regime, step):
    torch.manual_seed(0)
    depths = dict(resnet50=[3, 4, 6, 3], resnet200=[3, 24, 36, 3])[regime]
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, depths)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            # Else the sum over 75 blocks overflows what shows a difference.
            torch.nn.init.uniform_(module.weight, 0.1, 0.4)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    ours = ModernizedResNet(regime, step)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 95, 64)
    for mode in (False, True):
        theirs.train(mode)
        ours.train(mode)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for i, out in enumerate(ours(x)):
            y = getattr(theirs, f'layer{i + 1}')(y)
            assert (out - y).abs().max() <= 1e-5 * y.abs().max()
    for name, value in ours.state_dict().items():  # the running statistics, too
        if 'downsample_layers.0.1.running' in name:
            assert torch.equal(value, getattr(theirs.bn1, name.split('.')[-1]))


@pytest.mark.slow
@pytest.mark.parametrize('regime, arch', [('resnet50', 'tiny'), ('resnet200', 'base')])
def test_the_last_step_is_convnext(regime, arch):
    torch.manual_seed(0)
    theirs = ConvNeXt(arch, layer_scale_init_value=0.5).eval()
    ours = ModernizedResNet(regime, 'separate downsampling').eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.rand(1, 3, 64, 96)
    for out, expected in zip(ours(x), theirs(x), strict=True):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_step_differs_from_the_one_before():
    """But for the enhanced recipe, which is a way to train, and the kernel sizes 9 and
    11, given up before ReLU to GELU."""
    for steps in ROADMAP.values():
        changed = [
            {n for n, a, b in zip(before._fields, before, after) if a != b}
            for before, after in zip(
                list(steps.values())[:-1], list(steps.values())[1:]
            )
        ]
        assert [len(c) for c in changed[1:]] == [
            *[len(changed[1])],
            *[1] * 9,
            2,
            *[1] * 4,
        ]
        assert changed[0] == set()


@pytest.mark.parametrize('step', STEPS)
def test_step_trains_freezes_and_recomputes(step):
    """Gradients everywhere, exact with checkpointing, running statistics included."""
    x = torch.rand(2, 3, 64, 64)
    outs, grads, buffers = [], [], []
    for with_cp in (False, True):
        model = narrow(step, with_cp=with_cp, drop_path_rate=0.2).train()
        torch.manual_seed(1)
        maps = model(x)
        assert [m.shape[1] for m in maps] == list(model.out_channels)
        assert [m.shape[2] for m in maps] == [16, 8, 4, 2]
        sum(m.square().sum() for m in maps).backward()
        outs.append([m.detach() for m in maps])
        grads.append({n: p.grad for n, p in model.named_parameters()})
        buffers.append({n: b.clone() for n, b in model.named_buffers()})
    assert all(g is not None and g.isfinite().all() for g in grads[0].values())
    for a, b in zip(*outs):
        assert torch.equal(a, b)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(b, buffers[1][n]) for n, b in buffers[0].items())
    if any(n.endswith('running_mean') for n in buffers[0]):
        counted = [b for n, b in buffers[1].items() if n.endswith('batches_tracked')]
        assert {int(c) for c in counted} == {1}

    model = narrow(step, frozen_stages=2).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(x)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert {n.split('.')[1] for n in frozen} == {'0', '1'}
    for name, buffer in model.named_buffers():
        if name.endswith('running_mean'):
            is_frozen = name.split('.')[1] in '01'
            assert torch.equal(buffer, before[name]) == is_frozen


@pytest.mark.parametrize('norm', CHOICES['norm'])
def test_norm_eval_keeps_statistics(norm):
    model = narrow('patchify stem', norm=norm, norm_eval=True).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert model.training and model.stages[0][0].training


@pytest.mark.parametrize('step', STEPS)
def test_layer_decay_knows_every_parameter(step):
    model = ModernizedResNet('resnet50', step, width_multiplier=0.125)
    ids = {n: model.get_layer_depth(n) for n, _ in model.named_parameters()}
    assert {total for _, total in ids.values()} == {8}
    assert ids['downsample_layers.0.0.weight'][0] == 0
    by_stage = {
        n.split('.')[1]: i for n, (i, _) in ids.items() if n.startswith('stages.')
    }
    assert by_stage['0'] == 1 and by_stage['1'] == 2 and by_stage['3'] == 6


def test_decisions_one_by_one():
    """The step is what its decisions are, wherever one starts."""
    given = ROADMAP['resnet50']['fewer norms']._asdict()
    model = ModernizedResNet('resnet200', 'resnet', **given)
    assert model.decisions == ROADMAP['resnet50']['fewer norms']
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in ModernizedResNet(step='fewer norms').named_parameters()
    ]
    block = ModernizedResNet(step='kernel size 7', num_activations=1).stages[2][1]
    assert isinstance(block, RoadmapBlock)
    assert isinstance(block.act2, torch.nn.ReLU)
    assert isinstance(block.act1, torch.nn.Identity)
    last = ModernizedResNet(step='separate downsampling', kernel_size=5)
    assert last.is_convnext and last.stages[0][0].dwconv.kernel_size == (5, 5)


def test_names_of_steps_are_forgiving():
    for name in ('Patchify-Stem', 'patchify_stem', 'patchifystem', 'PATCHIFY STEM'):
        assert ModernizedResNet(step=name, **NARROW).decisions.stem == 'patchify'


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(step='patchfy'), "no step 'patchfy'; did you mean 'patchify stem'"),
        (dict(step='xyz'), "no step 'xyz'. There are 'resnet', 'enhanced recipe'"),
        (dict(step=3), 'step must be one of .*, got 3'),
        (dict(regime='resnet101'), "no regime 'resnet101'; did you mean 'resnet"),
        (dict(stem='deep'), "stem must be one of .*, got 'deep'"),
        (dict(norm='GN'), "norm must be one of .*, got 'GN'"),
        (dict(num_norms=2), 'num_norms must be one of .*, got 2'),
        (dict(kernel_size=4), 'kernel_size must be odd'),
        (dict(depths=[1, 2, 3]), 'depths must hold 4 integers'),
        (dict(depths=[1, 2, 3, 0]), 'depths must be at least 1'),
        (dict(width=0), 'width must be at least 1'),
        (dict(width_multiplier=0.001), 'width_multiplier=0.001 makes 0.096 channels'),
        (dict(width_multiplier=1e300), 'the stem needs 1 to 65536'),
        (dict(norm_eval='yes'), "norm_eval must be True or False, got 'yes'"),
        (dict(with_cp='no'), 'with_cp must be True or False'),
        (dict(num_norms=1.0), r'num_norms must be one of .*, got 1.0'),
        (dict(num_activations=True), 'num_activations must be one of .*, got True'),
        (dict(depthwise=1), 'depthwise must be one of .*, got 1'),
        (dict(width_multiplier='x'), 'width_multiplier must be a number'),
        (
            dict(step='resnet', depthwise_position='first'),
            "depthwise_position='first' moves a depthwise convolution, and",
        ),
        (
            dict(step='kernel size 7', depthwise=False),
            'set depthwise=True, or depthwise_position',
        ),
        (
            dict(step='fewer norms', layer_scale_init_value=1e-6),
            'these decisions have none: leave it out',
        ),
        (dict(frozen_stages=5), 'frozen_stages must be in'),
        (dict(out_indices=4), 'out_indices must be in'),
        (dict(drop_path_rate=1), 'drop_path_rate must be in'),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ModernizedResNet(**settings)


@pytest.mark.slow
@pytest.mark.parametrize('regime', ROADMAP)
def test_weights_of_one_step_in_another(regime):
    """Every step takes its own weights and names whose the others are, although some
    have the same names and shapes."""
    networks = {}
    for step, decisions in ROADMAP[regime].items():
        networks.setdefault(decisions, step)
    models = {
        step: narrow(step, regime, depths=None, width_multiplier=0.05)
        for step in networks.values()
    }
    states = {step: model.state_dict() for step, model in models.items()}
    for step, model in models.items():
        model.load_state_dict(states[step])
        for other, state in states.items():
            if other == step:
                continue
            before = copy.deepcopy(model.state_dict())
            with pytest.raises(CheckpointError) as error:
                model.load_state_dict(state)
            if model.is_convnext:
                assert 'ModernizedResNet' in str(error.value)
            else:
                assert f'step={other!r}' in str(error.value)
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_files_of_steps(tmp_path):
    """`Pretrained` and whole models, partly and not."""
    source = narrow('ReLU to GELU', seed=1)
    path = tmp_path / 'model.pth'
    state = {f'backbone.{n}': v for n, v in source.state_dict().items()}
    torch.save(dict(state_dict={**state, 'head.fc.weight': torch.rand(3, 3)}), path)
    pretrained = dict(type='Pretrained', checkpoint=str(path))
    model = narrow('ReLU to GELU', init_cfg=pretrained)
    model.init_weights()
    assert all(
        torch.equal(v, model.state_dict()[n]) for n, v in source.state_dict().items()
    )
    other = narrow('kernel size 7', init_cfg=pretrained)
    with pytest.raises(CheckpointError, match="step='ReLU.*\n.*activation='GELU'"):
        other.init_weights()
    part = narrow('kernel size 9', init_cfg=pretrained, allow_partial=True)
    kept = part.state_dict()['stages.0.0.conv1.weight'].clone()
    part.init_weights()
    assert torch.equal(part.state_dict()['stages.0.0.conv1.weight'], kept)
    assert torch.equal(
        part.state_dict()['stages.0.0.conv2.weight'],
        source.state_dict()['stages.0.0.conv2.weight'],
    )
    convnext = ConvNeXt(init_cfg=pretrained)
    with pytest.raises(CheckpointError, match="type='convnext_mm.ModernizedResNet'"):
        convnext.init_weights()
    damaged = {n: v for n, v in source.state_dict().items() if '.1.conv2' not in n}
    with pytest.raises(CheckpointError, match='missing in the checkpoint'):
        narrow('ReLU to GELU').load_state_dict(damaged)


def bad_activations():
    return {
        'missing': None,
        'float': torch.tensor([3.0, 1.0]),
        'longer': torch.tensor([3, 1, 0]),
        'of no kind': torch.tensor([3, 7]),
        'negative': torch.tensor([1, -1]),
        'two': torch.tensor([2, 0]),
        'empty': torch.tensor([], dtype=torch.long),
        'scalar': torch.tensor(3),
        'expanded': torch.zeros(1, dtype=torch.long).expand(2**31),
        'meta': torch.empty(2, dtype=torch.long, device='meta'),
        'sparse': torch.tensor([3, 1]).to_sparse(),
    }


@pytest.mark.parametrize('kind', bad_activations())
def test_damaged_activations(kind, tmp_path):
    """What tells steps with the same shapes apart must be there, and whole."""
    state = narrow('ReLU to GELU').state_dict()
    code = bad_activations()[kind]
    del state['activations']
    if code is not None:
        state['activations'] = code
    for step in ('ReLU to GELU', 'fewer activations'):
        with pytest.raises(CheckpointError, match='activations'):
            narrow(step).load_state_dict(state)
        path = tmp_path / 'x.pth'
        torch.save(state, path)
        model = narrow(step, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        with pytest.raises(CheckpointError, match='activations'):
            model.init_weights()


def test_activations_stay_its_own(tmp_path):
    """Whatever is loaded partly, and after the meta device."""
    partly = narrow('fewer activations', allow_partial=True)
    partly.load_state_dict(narrow('ReLU to GELU', seed=1).state_dict())
    assert partly.activations.tolist() == [1, 1]
    assert ModernizedResNet(step='fewer activations', **NARROW).load_state_dict(
        partly.state_dict()
    )
    source = narrow('kernel size 5').train()
    source(torch.rand(2, 3, 64, 64))
    path = tmp_path / 'x.pth'
    torch.save(source.state_dict(), path)
    with torch.device('meta'):
        model = ModernizedResNet(step='kernel size 5', **NARROW)
    model.to_empty(device='cpu')
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    model.init_weights()
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def resnet50():
    torch.manual_seed(0)
    return torchvision.models.resnet50().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize('door', ['state dict', 'file'])
@pytest.mark.parametrize(
    'change, message',
    [
        ({'layer1.0.se.fc1.weight': torch.rand(3, 3, 1, 1)}, 'not in the backbone'),
        ({'layer2.0.conv2.conv_offset.weight': torch.rand(3)}, 'not in the backbone'),
        ({'layer5.0.conv1.weight': torch.rand(3)}, 'not in the backbone'),
        (
            {'conv1.weight': torch.ones(64, 3, 7, 7).double() * 1e300},
            'than their dtype',
        ),
        ({'conv1.weight': None}, 'stem is not one convolution'),
        ({'layer1.0.bn1.running_var': None}, 'running_var'),
        ({'layer3.2.conv1.weight': torch.zeros(1).expand(2**34, 1, 1, 1)}, 'expanded'),
        ({'layer3.2.conv1.weight': torch.zeros(256, 1024, 1, 1).int()}, 'int32'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_other_resnets(change, message, door, tmp_path):
    state = {**resnet50(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    path = tmp_path / 'x.pth'
    torch.save(state, path)
    pretrained = dict(type='Pretrained', checkpoint=str(path))
    model = ModernizedResNet(step='resnet', init_cfg=pretrained)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state) if door == 'state dict' else model.init_weights()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.slow
def test_resnet_with_other_channels_and_copies(tmp_path, caplog):
    """The stem adapts as ConvNeXt's does; an averaged copy is preferred."""
    state = resnet50()
    model = ModernizedResNet(step='resnet', in_channels=1)
    model.load_state_dict(state)
    expected = state['conv1.weight'].mean(1, keepdim=True) * 3
    torch.testing.assert_close(model.downsample_layers[0][0].weight, expected)
    averaged = {name: value + 1 for name, value in state.items()}
    path = tmp_path / 'x.pth'
    torch.save(dict(model=state, model_ema=averaged), path)
    model = ModernizedResNet(
        step='resnet', init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    model.init_weights()
    assert torch.equal(model.downsample_layers[0][0].weight, averaged['conv1.weight'])
