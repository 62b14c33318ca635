"""A checkpoint loads completely, or not at all and says what helps."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint
from torch import nn

import convnext_mm
from convnext_mm import ConvNeXt
from convnext_mm.archs import ARCHS
from convnext_mm.checkpoint import CheckpointMismatchError
from convnext_mm.checkpoint.layout import Spec, expected_shapes, infer_spec

STEM = 'downsample_layers.0.0.weight'


@pytest.fixture
def path(tmp_path, weights):
    torch.save(weights, tmp_path / 'weights.pth')
    return str(tmp_path / 'weights.pth')


def load(path, arch, prefix=None, **settings) -> ConvNeXt:
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    model = ConvNeXt(arch, init_cfg=init_cfg, **settings)
    model.init_weights()
    return model


def save(weights, tmp_path):
    torch.save(weights, tmp_path / 'changed.pth')
    return tmp_path / 'changed.pth'


def empty_state(arch, **settings):
    """Shapes of a published network, without its memory."""
    arch = ARCHS[arch]
    settings = dict(dict(use_grn=False, layer_scale=True), **settings)
    spec = Spec(
        arch.depths,
        arch.channels,
        3,
        4,
        7,
        tuple(4 * c for c in arch.channels),
        **settings,
    )
    return {
        name: torch.zeros(1, dtype=torch.half).expand(shape)
        for name, shape in expected_shapes(spec).items()
    }


def test_init_cfg_loads_everything(path, arch, model, features):
    loaded = load(path, arch)
    for ours, theirs in zip(features(loaded), features(model)):
        assert torch.equal(ours, theirs)
    assert loaded.init_cfg == dict(type='Pretrained', checkpoint=path)


def test_init_cfg_inside_a_model_and_in_a_list(path, arch, weights):
    class Detector(BaseModule):
        def __init__(self):
            super().__init__()
            self.backbone = ConvNeXt(
                arch,
                init_cfg=[
                    dict(type='Pretrained', checkpoint=path),
                    dict(type='Constant', layer='Conv2d', val=1.0),
                ],
            )

    model = Detector()
    model.init_weights()
    assert torch.equal(model.backbone.state_dict()[STEM], weights[STEM])


def test_prefix(tmp_path, weights, arch):
    path = save(
        {f'student.backbone.{k}': t for k, t in weights.items()}
        | {f'teacher.backbone.{k}': t + 1 for k, t in weights.items()},
        tmp_path,
    )
    model = load(path, arch, prefix='teacher.backbone.')
    assert torch.equal(model.state_dict()[STEM], weights[STEM] + 1)
    with pytest.raises(ValueError, match='prefix='):
        load(path, arch)


def test_missing_norms_keep_their_values_with_one_line(tmp_path, weights, arch, log):
    weights = {k: t for k, t in weights.items() if not k.startswith('norm')}
    model = load(save(weights, tmp_path), arch)
    assert bool((model.norm2.weight == 1).all())
    lines = [line for line in log if 'Output norms' in line]
    assert len(lines) == 1
    assert 'norm0, norm1, norm2, norm3' in lines[0]


@pytest.mark.parametrize('gap', [False, True])
def test_final_norm_only_with_gap(gap, tmp_path, weights, arch, log):
    weights = {k: t for k, t in weights.items() if not k.startswith('norm')}
    weights.update(
        {
            'norm.weight': torch.full((20,), 3.0),
            'norm.bias': torch.full((20,), 4.0),
            'head.weight': torch.ones(5, 20),
        }
    )
    model = load(
        save(weights, tmp_path), arch, gap_before_final_norm=gap, out_indices=3
    )
    assert model.norm3.weight[0].item() == (3 if gap else 1)
    left_out = [line for line in log if line.startswith('Left out')]
    assert len(left_out) == 1
    assert 'classifier head: head.weight' in left_out[0]
    assert ('final norm' in left_out[0]) != gap


def test_stages_that_are_not_built_are_left_out(path, arch, log):
    model = load(path, arch, out_indices=(0, 1))
    assert len(model.stages) == 2
    assert any(
        'stages that the model does not build' in line
        and 'output norms that the model does not build' in line
        for line in log
    )


def test_fewer_stages_round_trip(path, arch, tmp_path, log):
    model = load(path, arch, out_indices=(0, 1))
    again = load(save(model.state_dict(), tmp_path), arch, out_indices=(0, 1))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )
    assert any('first 2 stages' in line for line in log)
    with pytest.raises(CheckpointMismatchError, match='only the first 2'):
        load(tmp_path / 'changed.pth', arch)


@pytest.mark.parametrize(
    'state, settings, hints',
    [
        (
            empty_state('base'),
            dict(arch='tiny'),
            ['is base, the config says tiny', "arch='base'"],
        ),
        (
            empty_state('small'),
            dict(arch='tiny'),
            ['is small, the config says tiny', r'stages.2.*.dwconv.weight (18 b'],
        ),
        (
            empty_state('tiny'),
            dict(arch='small'),
            ['is tiny, the config says small', 'missing in the checkpoint'],
        ),
        (
            empty_state('atto', use_grn=True, layer_scale=False),
            dict(arch='atto'),
            ['V2 weights, the backbone is V1: set use_grn=True'],
        ),
        (
            empty_state('atto'),
            dict(arch='atto', use_grn=True),
            ['V1 weights, the backbone is V2: set use_grn=False'],
        ),
        (
            empty_state('atto'),
            dict(arch='atto', layer_scale_init_value=0.0),
            ['has layer scale, the backbone not'],
        ),
        (
            empty_state('atto', layer_scale=False),
            dict(arch='atto'),
            ['no layer scale: set layer_scale_init_value=0'],
        ),
        (
            {**empty_state('atto'), STEM: torch.zeros(40, 4, 4, 4)},
            dict(arch='atto'),
            ['first layer has 4 channels, the backbone 3: set in_channels=4'],
        ),
        (
            {**empty_state('atto'), STEM: torch.zeros(40, 3, 2, 2)},
            dict(arch='atto'),
            ['set stem_patch_size=2'],
        ),
        (
            empty_state('atto'),
            dict(arch='atto', kernel_size=5),
            ['kernel_size is 7, the backbone 5: set kernel_size=7'],
        ),
        (
            empty_state('atto'),
            dict(arch='atto', mlp_ratio=2),
            ['mlp_ratio is 4: set mlp_ratio'],
        ),
    ],
)
def test_mismatch_stops_with_a_diagnosis(state, settings, hints):
    model = ConvNeXt(**settings)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    before = model.stages[0][0].dwconv.weight.clone()
    with pytest.raises(CheckpointMismatchError) as error:
        model.load_state_dict(state, strict=False)
    message = str(error.value)
    for hint in [*hints, 'allow_partial=True', 'Nothing was loaded']:
        assert hint in message
    assert message.count('\n') < 12
    assert torch.equal(model.stages[0][0].dwconv.weight, before)


def test_unknown_parameters_inside_the_stages_are_no_leftovers(weights, arch):
    weights['stages.0.0.attention.weight'] = torch.zeros(3)
    with pytest.raises(CheckpointMismatchError, match='not in the backbone'):
        ConvNeXt(arch).load_state_dict(weights, strict=False)
    with pytest.raises(CheckpointMismatchError, match='no place'):
        convnext_mm.convert_state_dict(weights)


def test_weights_of_384_pixels_are_fine(path, arch):
    model = load(path, arch).eval()
    assert model(torch.rand(1, 3, 384, 384))[3].shape == (1, 20, 12, 12)


def test_allow_partial_loads_what_fits(tmp_path, weights, arch, log):
    del weights['stages.1.0.gamma']
    weights[STEM] = torch.zeros(8, 5, 4, 4)
    path = save(weights, tmp_path)
    with pytest.raises(CheckpointMismatchError):
        load(path, arch)
    model = load(path, arch, allow_partial=True)
    assert torch.equal(
        model.state_dict()['stages.0.0.dwconv.weight'],
        weights['stages.0.0.dwconv.weight'],
    )
    assert model.stages[1][0].gamma[0].item() == pytest.approx(1e-6)
    assert any(line.startswith('allow_partial') for line in log)


def test_allow_partial_where_nothing_fits(weights):
    arch = dict(depths=[1] * 4, channels=[7, 9, 11, 13])
    with pytest.raises(CheckpointMismatchError, match='Nothing fits'):
        ConvNeXt(arch, allow_partial=True).load_state_dict(weights, strict=False)


@pytest.mark.parametrize('channels', [1, 2, 4, 6, 9])
def test_stem_takes_other_channels(channels, path, arch, weights, log):
    model = load(path, arch, in_channels=channels)
    adapted = model.state_dict()[STEM]
    if channels < 3:
        expected = weights[STEM].mean(1, keepdim=True).expand_as(adapted)
    else:
        expected = torch.cat([weights[STEM]] * 3, 1)[:, :channels]
    assert torch.allclose(adapted, expected * 3 / channels)
    if channels < 3 or channels % 3 == 0:  # grey images give the same
        grey = torch.rand(1, 1, 4, 4)
        assert torch.allclose(
            (adapted * grey).sum((1, 2, 3)),
            (weights[STEM] * grey).sum((1, 2, 3)),
            atol=1e-5,
        )
    assert any('3 channels' in line and str(channels) in line for line in log)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite_are_named(value, weights, log):
    weights['stages.0.0.gamma'][2] = value
    convnext_mm.convert_state_dict(weights)
    assert any('NaN or Inf: stages.0.0.gamma' in line for line in log)


def test_large_finite_values_are_not_reported(weights, log):
    weights['stages.0.0.gamma'][:] = 3e38
    convnext_mm.convert_state_dict(weights)
    assert not any('NaN' in line for line in log)


class Detector(nn.Module):
    """A whole model, as load_from meets it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(3, 2)


@pytest.mark.parametrize('wrapper', ['', 'module.'])
def test_foreign_backbone_in_a_whole_model(wrapper, tmp_path, arch, model, features):
    reference = pytest.importorskip('mmpretrain.models').ConvNeXt(
        arch, out_indices=(0, 1, 2, 3), gap_before_final_norm=False
    )
    reference.load_state_dict(
        {
            k.replace('dwconv', 'depthwise_conv').replace('pwconv', 'pointwise_conv'): t
            for k, t in model.state_dict().items()
        }
    )
    source = Detector(reference)
    torch.save(
        dict(state_dict={wrapper + k: t for k, t in source.state_dict().items()}),
        tmp_path / 'detector.pth',
    )
    target = Detector(ConvNeXt(arch))
    mmengine_load_checkpoint(target, str(tmp_path / 'detector.pth'))
    assert torch.equal(target.head.weight, source.head.weight)
    for ours, theirs in zip(features(target.backbone), features(model)):
        assert torch.equal(ours, theirs)


def test_incomplete_backbone_in_a_whole_model(arch, model):
    source = Detector(model).state_dict()
    del source['backbone.stages.3.0.pwconv1.weight']
    with pytest.raises(CheckpointMismatchError, match='stages.3.0.pwconv1'):
        Detector(ConvNeXt(arch)).load_state_dict(source, strict=False)


def test_load_state_dict_of_own_weights_is_torchs(weights, arch):
    names = ['norm1.weight', 'norm1.bias']
    for name in names:
        del weights[name]
    with pytest.raises(RuntimeError, match='norm1.weight'):
        ConvNeXt(arch).load_state_dict(weights)
    missing, unexpected = ConvNeXt(arch).load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (names, [])
    with pytest.raises(CheckpointMismatchError, match='no weights'):
        ConvNeXt(arch).load_state_dict({}, strict=False)


@pytest.mark.parametrize('name', ['norm1.weight', 'norm1.bias'])
def test_output_norms_load_whole(name, weights, arch, log):
    del weights[name]
    with pytest.raises(CheckpointMismatchError, match=name):
        convnext_mm.convert_state_dict(weights)
    with pytest.raises(CheckpointMismatchError, match=name):
        ConvNeXt(arch).load_state_dict(weights, strict=False)
    ConvNeXt(arch, out_indices=(0, 2, 3)).load_state_dict(
        weights, strict=False
    )  # not built
    ConvNeXt(arch, allow_partial=True).load_state_dict(weights, strict=False)
    assert any(line.startswith('allow_partial') and name in line for line in log)


def test_output_norm_of_another_width(weights):
    weights['norm1.weight'] = torch.ones(5)
    with pytest.raises(CheckpointMismatchError, match=r'norm1.weight \(5,\)'):
        convnext_mm.convert_state_dict(weights)


@pytest.mark.parametrize('name', ['stages.1.0.gamma', 'norm1.weight', STEM])
@pytest.mark.parametrize(
    'value, source, target',
    [
        (1e300, torch.float64, torch.float32),
        (1e300, torch.float64, torch.bfloat16),
        (3.4e38, torch.float32, torch.bfloat16),
        (7e4, torch.float32, torch.float16),
        (7e4, torch.bfloat16, torch.float16),
    ],
)
def test_values_that_the_dtype_cannot_hold(
    name, value, source, target, weights, arch, log
):
    weights = {key: tensor.to(source) for key, tensor in weights.items()}
    weights[name].view(-1)[0] = -value
    weights[name].view(-1)[1] = float('nan')
    with pytest.raises(CheckpointMismatchError) as error:
        ConvNeXt(arch).to(target).load_state_dict(weights)
    magnitude = weights[name].view(-1)[0].abs().item()
    assert f'{name}, {magnitude:.3g} in {target}' in str(error.value)
    model = ConvNeXt(arch, allow_partial=True).to(target)
    model.load_state_dict(weights, strict=False)
    assert bool(model.state_dict()[name].isfinite().all())
    assert any(line.startswith('allow_partial') for line in log)
    # What it holds is no reason, NaN or not.
    weights[name].view(-1)[0] = 0.9 * torch.finfo(target).max
    ConvNeXt(arch).to(target).load_state_dict(weights)


@pytest.mark.parametrize('channels, value', [(1, 3e38), (2, 3e38), (4, 1e39)])
def test_adapted_stem_that_the_dtype_cannot_hold(channels, value, weights, arch):
    weights[STEM] = torch.full((8, 3, 4, 4), value, dtype=torch.float64)
    with pytest.raises(CheckpointMismatchError, match='such as downsample'):
        ConvNeXt(arch, in_channels=channels).load_state_dict(weights)


@pytest.mark.parametrize('channels', [1, 3, 6])
@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats(dtype, channels, weights, arch, log):
    weights = {key: tensor.to(dtype) for key, tensor in weights.items()}
    model = ConvNeXt(arch, in_channels=channels)
    model.load_state_dict(weights)
    if channels == 3:
        assert all(
            torch.equal(tensor, weights[name].float())
            for name, tensor in model.state_dict().items()
        )
    weights['norm0.bias'] = torch.full((8,), float('nan')).to(dtype)
    convnext_mm.convert_state_dict(weights)
    assert any('NaN or Inf: norm0.bias' in line for line in log)


def test_final_norm_without_the_last_stage(weights, arch):
    weights = {k: t for k, t in weights.items() if not k.startswith('norm')}
    weights.update({'norm.weight': torch.ones(20), 'norm.bias': torch.ones(20)})
    for settings in (dict(out_indices=1), dict(out_norm=False)):
        ConvNeXt(arch, gap_before_final_norm=True, **settings).load_state_dict(
            weights, strict=False
        )


def test_spec_of_published_networks():
    for name in ARCHS:
        spec = infer_spec(empty_state(name))
        assert name in spec.arch.split(' or ')
    assert 'custom' not in str(spec)


def test_convert_state_dict_takes_dictionaries_only(path):
    with pytest.raises(TypeError, match='dictionary of tensors'):
        convnext_mm.convert_state_dict(path)
