"""The isotropic ConvNeXt: golden numbers, costs, checkpoints, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import repo
from convnext_mm import (
    CheckpointError,
    ConvNeXt,
    IsotropicConvNeXt,
    SimplePyramid,
    load_checkpoint,
)
from convnext_mm.archs import ISOTROPIC_ARCHS
from convnext_mm.models.block import IMPL_NAMES

SMALL = dict(depth=3, channels=24)


def golden(data_dir, kind):
    arrays = np.load(data_dir / 'golden_isotropic.npz')
    start = f'{kind}/state/'
    state = {
        k[len(start) :]: torch.from_numpy(arrays[k])
        for k in arrays.files
        if k.startswith(start)
    }
    return state, {
        k: torch.from_numpy(arrays[f'{kind}/{k}']) for k in ('x', 'map', 'logits')
    }


@pytest.fixture
def data_dir():
    return repo.ROOT / 'tests/data'


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize('kind', ['noscale', 'scale'])
@pytest.mark.parametrize('impl', [n for n in IMPL_NAMES if n != 'triton'])
def test_golden(data_dir, tmp_path, kind, impl):
    """Released names through the file door; the last map, and the logits through
    pooling, norm and classifier."""
    state, expected = golden(data_dir, kind)
    path = tmp_path / 'convnext_iso.pth'
    torch.save(dict(model=state), path)
    settings = dict(
        arch=SMALL,
        layer_scale_init_value=1e-6 if kind == 'scale' else 0,
        impl=impl,
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
    )
    model = IsotropicConvNeXt(out_norm=False, **settings)
    model.init_weights()
    (out,) = model.eval()(expected['x'])
    assert relative(out, expected['map']) < 1e-5
    pooled = IsotropicConvNeXt(gap_before_final_norm=True, **settings)
    pooled.init_weights()
    (features,) = pooled.eval()(expected['x'])
    logits = features @ state['head.weight'].T + state['head.bias']
    assert relative(logits, expected['logits']) < 1e-5
    if impl == 'lean':
        deployed = copy.deepcopy(model).switch_to_deploy()
        with torch.no_grad():
            assert relative(deployed(expected['x'])[0], expected['map']) < 1e-5


@pytest.mark.parametrize(
    'arch, params, gflops',
    [('small', 22, '4.3'), ('base', 87, '16.9'), ('large', 306, '59.7')],
)
def test_costs_are_published(arch, params, gflops):
    with torch.device('meta'):
        model = IsotropicConvNeXt(arch, gap_before_final_norm=True).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            (features,) = model(torch.rand(1, 3, 224, 224))
    classifier = 1000 * features.shape[1]
    total = sum(p.numel() for p in model.parameters()) + classifier + 1000
    assert round(total / 1e6) == params
    assert f'{(counter.get_total_flops() // 2 + classifier) / 1e9:.1f}' == gflops
    assert (model.stages[0][0].gamma is not None) == ISOTROPIC_ARCHS[arch].layer_scale


def test_gradients_with_every_implementation():
    x = torch.rand(2, 3, 50, 33)
    results = []
    for impl in ('eager', 'lean', 'lean+'):
        for with_cp in (False, True):
            torch.manual_seed(0)
            model = IsotropicConvNeXt(SMALL, impl=impl, with_cp=with_cp)
            (out,) = model(x)
            assert out.shape == (2, 24, 3, 2)
            (out * torch.arange(24.0)[:, None, None]).sum().backward()
            results.append({n: p.grad for n, p in model.named_parameters()})
    for result in results[1:]:
        for name, grad in result.items():
            torch.testing.assert_close(grad, results[0][name], rtol=1e-4, atol=1e-4)


def test_layer_decay_by_depth():
    model = IsotropicConvNeXt(SMALL)
    assert model.get_layer_depth(
        'backbone.downsample_layers.0.0.bias', 'backbone.'
    ) == (0, 5)
    for block in range(3):
        name = f'backbone.stages.0.{block}.norm.weight'
        assert model.get_layer_depth(name, 'backbone.') == (block + 1, 5)
    assert model.get_layer_depth('backbone.norm0.weight', 'backbone.') == (4, 5)
    assert model.get_layer_depth('neck.x', 'backbone.') == (4, 5)
    ids = [
        IsotropicConvNeXt('small').get_layer_id(f'stages.0.{b}.x', 6, 'layer_wise', '')
        for b in range(18)
    ]
    assert ids == [1 + b // 3 for b in range(18)]


def test_frozen_blocks():
    model = IsotropicConvNeXt(SMALL, frozen_stages=2).train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split('.')[2] for n in trained if n.startswith('stages')} == {'2'}
    assert not any(n.startswith('downsample') for n in trained)


def test_door_for_state_dicts(data_dir, tmp_path):
    """`load_checkpoint` gives our names; damage and other networks are named."""
    state, _ = golden(data_dir, 'noscale')
    path = tmp_path / 'iso.pth'
    torch.save(state, path)
    loaded = load_checkpoint(path)
    model = IsotropicConvNeXt(SMALL, out_norm=False, layer_scale_init_value=0)
    model.load_state_dict(loaded)
    assert loaded.keys() == model.state_dict().keys()
    model.load_state_dict(model.state_dict())

    with pytest.raises(CheckpointError, match="type='convnext_mm.IsotropicConvNeXt'"):
        ConvNeXt().load_state_dict(state)
    with pytest.raises(CheckpointError, match="type='convnext_mm.ConvNeXt'"):
        model.load_state_dict(ConvNeXt('atto').state_dict())
    with pytest.raises(CheckpointError, match='layer_scale_init_value=0'):
        IsotropicConvNeXt(SMALL, layer_scale_init_value=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match='depth=3, channels=24'):
        IsotropicConvNeXt(dict(depth=4, channels=24)).load_state_dict(state)
    damaged = {n: v for n, v in state.items() if n != 'blocks.1.pwconv1.bias'}
    with pytest.raises(CheckpointError, match='pwconv1.bias'):
        model.load_state_dict(damaged)
    torch.save(damaged, path)
    with pytest.raises(CheckpointError, match='pwconv1.bias'):
        load_checkpoint(path)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(arch='tiny'), "unknown arch 'tiny'; one of .'small'"),
        (dict(arch=3), 'arch must be a name'),
        (dict(arch=dict(depths=[3])), 'keys depth and channels'),
        (dict(arch=dict(depth=0, channels=8)), 'depth'),
        (dict(patch_size=0), 'patch_size must be at least 1'),
        (dict(frozen_stages=19), 'frozen_stages must be in'),
        (dict(kernel_size=2), 'kernel_size must be odd'),
        (dict(impl='fast'), 'impl must be one of'),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        IsotropicConvNeXt(**settings)


def test_small_image():
    with pytest.raises(ValueError, match='at least 16 x 16 pixels, got 15 x 40'):
        IsotropicConvNeXt(SMALL)(torch.rand(1, 3, 15, 40))


def test_pyramid():
    torch.manual_seed(0)
    neck = SimplePyramid([24])
    maps = neck([torch.rand(2, 24, 6, 5)])
    shapes = [(2, 6, 24, 20), (2, 12, 12, 10), (2, 24, 6, 5), (2, 24, 3, 2)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert neck.out_channels == (6, 12, 24, 24)
    for wrong in ([maps[2], maps[2]], maps[2]):
        with pytest.raises(ValueError, match='one map, got 2'):
            neck(wrong)
    with pytest.raises(ValueError, match=r'at least 2 x 2, got \(1, 5\)'):
        neck([torch.rand(1, 24, 1, 5)])
    for wrong in (0, 6, 'x', [24, 24]):
        with pytest.raises(ValueError, match='in_channels must be'):
            SimplePyramid(wrong)
