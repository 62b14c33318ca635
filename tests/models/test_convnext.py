"""The backbone: numbers, shapes, freezing, and what it refuses."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

import repo
from convnext_mm import ConvNeXt
from convnext_mm.archs import ARCHS
from convnext_mm.models.block import IMPL_NAMES, Block, Downsample
from convnext_mm.models.convnext import LayerNorm2d
from convnext_mm.ops.eager import grn
from toys import randomise
from warm_python import warm_python

SMALL = dict(depths=[1, 2, 3, 1], channels=[8, 16, 24, 32])
# Classifiers' parameters in millions, 1000 classes: arXiv 2201.03545 (V1) and
# arXiv 2301.00808 (V2).
PUBLISHED_V1 = dict(tiny=29, small=50, base=89, large=198, xlarge=350)
PUBLISHED_V2 = dict(
    atto=3.7, femto=5.2, pico=9.1, nano=15.6, tiny=28.6, base=89, large=198, huge=660
)


def golden(data_dir, version, **settings):
    arrays = np.load(data_dir / f'golden_v{version}.npz')
    arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
    state = {k[6:]: v for k, v in arrays.items() if k.startswith('param/')}
    model = ConvNeXt(
        dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32]),
        use_grn=version == 2,
        **settings,
    )
    model.load_state_dict(state)
    return model, arrays


def relative(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize('size', ['even', 'odd'])
@pytest.mark.parametrize('version', [1, 2])
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('impl', IMPL_NAMES)
def test_golden_outputs_and_gradients(data_dir, version, size, with_cp, impl):
    model, arrays = golden(data_dir, version, impl=impl, with_cp=with_cp)
    x = arrays[f'{size}/input'].requires_grad_()
    outs = model(x)
    assert len(outs) == 4
    for i, out in enumerate(outs):
        assert relative(out, arrays[f'{size}/out{i}']) < 1e-5
    torch.autograd.backward(outs, [arrays[f'{size}/cotangent{i}'] for i in range(4)])
    assert relative(x.grad, arrays[f'{size}/grad_input']) < 1e-4
    for name, param in model.named_parameters():
        assert relative(param.grad, arrays[f'{size}/grad/{name}']) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('arch', ARCHS)
def test_arch(arch, use_grn):
    with torch.device('meta'):
        model = ConvNeXt(arch, use_grn=use_grn)
        outs = model(torch.rand(2, 3, 96, 67))
    channels = ARCHS[arch].channels
    assert model.channels == model.out_channels == channels
    assert model.depths == ARCHS[arch].depths and model.num_stages == 4
    sizes = [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert [tuple(y.shape) for y in outs] == [
        (2, c, *s) for c, s in zip(channels, sizes)
    ]
    norms = {m.eps for m in model.modules() if hasattr(m, 'eps')}
    assert norms == {1e-5 if arch == 'xxlarge' else 1e-6}
    # The classifier has one final norm and a linear layer more, no out norms.
    count = (
        sum(p.numel() for n, p in model.named_parameters() if not n.startswith('norm'))
        + channels[-1] * 1002
        + 1000
    )
    published = (PUBLISHED_V2 if use_grn else PUBLISHED_V1).get(arch)
    if published is not None:
        digits = 1 if published < 29 and use_grn else 0
        assert round(count / 1e6, digits) == published
    if (arch, use_grn) == ('tiny', False):
        assert count == 28_589_128
    timm = pytest.importorskip('timm')
    with torch.device('meta'):
        # conv_mlp only changes the shape of timm's pointwise weights.
        peer = timm.create_model(
            f'convnext{"v2" if use_grn else ""}_tiny',
            depths=ARCHS[arch].depths,
            dims=channels,
        )
    assert count == sum(p.numel() for p in peer.parameters())


def test_tiny_block_parameters(data_dir):
    recipes = json.loads((data_dir / 'recipes.json').read_text())
    expected = recipes['imagenet']['published']['tiny_block_parameters_per_stage']
    model = ConvNeXt('tiny')
    assert [
        sum(p.numel() for p in stage[0].parameters()) for stage in model.stages
    ] == expected


@pytest.mark.parametrize('size', [(32, 32), (33, 47), (95, 64), (127, 128)])
def test_odd_sizes(size):
    model = ConvNeXt(SMALL).eval()
    for stride, out in zip((4, 8, 16, 32), model(torch.rand(1, 3, *size))):
        assert out.shape[2:] == (size[0] // stride, size[1] // stride)


@pytest.mark.parametrize(
    'out_indices, emitted',
    [
        (3, [3]),
        (-1, [3]),
        (0, [0]),
        ([1, 3], [1, 3]),
        ([-1, 0], [0, 3]),
        ((2, 1), [1, 2]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_out_indices_every_parameter_gets_a_gradient(out_indices, emitted):
    model = ConvNeXt(SMALL, out_indices=out_indices)
    assert list(model.out_indices) == emitted
    outs = model(torch.rand(2, 3, 64, 64))
    assert [y.shape[1] for y in outs] == [SMALL['channels'][i] for i in emitted]
    assert model.out_channels == tuple(y.shape[1] for y in outs)
    sum(y.square().sum() + y.sum() for y in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_out_norm():
    torch.manual_seed(0)
    plain = ConvNeXt(SMALL, out_norm=False).eval()
    normed = ConvNeXt(SMALL).eval()
    normed.load_state_dict(plain.state_dict(), strict=False)
    assert not [k for k in plain.state_dict() if k.startswith('norm')]
    x = torch.rand(1, 3, 64, 64)
    for i, (a, b) in enumerate(zip(plain(x), normed(x))):
        norm = getattr(normed, f'norm{i}')
        torch.testing.assert_close(norm(a), b)
        expected = torch.nn.functional.layer_norm(
            a.permute(0, 2, 3, 1), a.shape[1:2], norm.weight, norm.bias, 1e-6
        )
        torch.testing.assert_close(b.permute(0, 2, 3, 1), expected)


def test_gap_before_final_norm():
    torch.manual_seed(0)
    maps = ConvNeXt(SMALL, out_norm=False).eval()
    model = ConvNeXt(SMALL, gap_before_final_norm=True).eval()
    model.load_state_dict(maps.state_dict(), strict=False)
    x = torch.rand(2, 3, 64, 64)
    for i, (pooled, whole) in enumerate(zip(model(x), maps(x))):
        assert pooled.shape == (2, SMALL['channels'][i])
        expected = torch.nn.functional.layer_norm(
            whole.mean((2, 3)), whole.shape[1:2], eps=1e-6
        )
        torch.testing.assert_close(pooled, expected)


def test_init():
    torch.manual_seed(0)
    model = ConvNeXt('atto', layer_scale_init_value=0.5)
    for name, param in model.named_parameters():
        if name == 'downsample_layers.0.0.bias':
            continue  # see test_initialisation.py
        if name.endswith('bias'):
            assert (param == 0).all(), name
        elif name.endswith('gamma'):
            assert (param == 0.5).all(), name
        elif param.ndim == 1:
            assert (param == 1).all(), name
        else:
            assert abs(param.std().item() - 0.02) < 0.005, name
            assert abs(param.mean().item()) < 0.003, name


def test_v2_has_no_layer_scale():
    model = ConvNeXt(SMALL, use_grn=True, layer_scale_init_value=1.0)
    state = model.state_dict()
    assert not [k for k in state if k.endswith('.gamma') and 'grn' not in k]
    assert state['stages.1.0.grn.gamma'].shape == (1, 1, 1, 64)
    assert not [
        k
        for k in ConvNeXt(SMALL, layer_scale_init_value=0).state_dict()
        if k.endswith('gamma')
    ]


def test_stochastic_depth_is_linear_over_all_blocks():
    model = ConvNeXt(SMALL, drop_path_rate=0.6, out_indices=(0, 2))
    rates = [b.drop_path for s in model.stages for b in s]
    np.testing.assert_allclose(rates, np.linspace(0, 0.6, 7)[:6], rtol=1e-6)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    block = ConvNeXt(SMALL, drop_path_rate=0.5).stages[3][0]
    torch.nn.init.ones_(block.gamma)
    x = torch.rand(2000, 32, 2, 2)
    with torch.no_grad():
        change = block.train()(x) - x
        full = block.eval()(x) - x
    dropped = (change == 0).flatten(1).all(1)
    assert 0.45 < dropped.float().mean() < 0.55
    torch.testing.assert_close(
        change[~dropped], 2 * full[~dropped], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('with_cp', [False, True])
def test_drop_path_decisions_follow_the_seed_alone(dtype, with_cp):
    def decisions(dtype, with_cp):
        torch.manual_seed(3)
        model = ConvNeXt(SMALL, drop_path_rate=0.9, with_cp=with_cp)
        torch.manual_seed(7)
        seen = []
        for stage in model.stages:
            for block in stage:
                run = block._run
                block._run = lambda x, s, run=run: (seen.append(s), run(x, s))[1]
        x = torch.rand(6, 3, 32, 32)
        model.to(dtype)(x.to(dtype))
        return [s for s in seen if s is not None]

    assert all(
        map(torch.equal, decisions(dtype, with_cp), decisions(torch.float32, False))
    )


@pytest.mark.parametrize('use_grn', [False, True])
def test_with_cp_gives_the_same_gradients(use_grn):
    torch.manual_seed(0)
    a = ConvNeXt(SMALL, use_grn=use_grn, drop_path_rate=0.5)
    b = copy.deepcopy(a)
    for stage in b.stages:
        for block in stage:
            block.with_cp = True
    x = torch.rand(4, 3, 64, 64)
    for model in (a, b):
        torch.manual_seed(1)
        sum(y.square().sum() for y in model(x)).backward()
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_freezing(frozen_stages):
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, frozen_stages=frozen_stages, drop_path_rate=0.5)
    assert model.train() is model and model.eval() is model
    model.train()
    frozen = tuple(
        f'{part}.{i}.'
        for i in range(max(0, frozen_stages))
        for part in ('downsample_layers', 'stages')
    )
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    sum(
        (y * torch.rand_like(y)).sum() for y in model(torch.rand(16, 3, 64, 64))
    ).backward()
    optimizer.step()
    for name, param in model.named_parameters():
        is_frozen = bool(frozen) and name.startswith(frozen)
        assert param.requires_grad != is_frozen, name
        assert (param.grad is None) == is_frozen, name
        assert torch.equal(param, before[name]) == is_frozen, name
    for name, module in model.named_modules():
        if frozen and (name + '.').startswith(frozen):
            assert not module.training, name


def test_frozen_stages_beyond_the_built_ones():
    model = ConvNeXt(SMALL, out_indices=[1], frozen_stages=4)
    assert {
        n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad
    } == {'norm1'}


def test_deepcopy_and_pickle():
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, use_grn=True).eval()
    x = torch.rand(1, 3, 64, 64)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, model(x), other(x)))


def test_layout_is_channels_last_throughout():
    model = ConvNeXt(SMALL, out_layout='channels_last').eval()
    maps = []
    for module in model.modules():
        if isinstance(module, (LayerNorm2d, Block, Downsample)):
            module.register_forward_hook(lambda m, i, o: maps.append(o))
    model(torch.rand(2, 3, 64, 64))
    assert len(maps) == 7 + 1 + 3 + 4
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize('out_norm', [True, False])
def test_emitted_maps_are_what_roi_align_reads(out_norm):
    # mmcv's compiled one reads channels-last maps as if they were (N, C, H, W).
    ops = pytest.importorskip('mmcv.ops')
    align = ops.RoIAlign(7, 1 / 4, 0)
    rois = torch.tensor([[0, 4, 4, 40, 40.0], [1, 10, 8, 60, 50]])
    maps = ConvNeXt(SMALL, out_norm=out_norm)(torch.rand(2, 3, 64, 64))
    assert all(m.is_contiguous() for m in maps)
    copied = torch.zeros(maps[0].shape).copy_(maps[0])
    assert torch.equal(align(maps[0], rois), align(copied, rois))


@pytest.mark.parametrize('out_norm', [True, False])
def test_channels_last_maps_have_equal_values(out_norm):
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, out_norm=out_norm)
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    model.out_layout = 'channels_last'
    for ours, theirs in zip(model(x), expected):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert not ours.is_contiguous() or 1 in ours.shape[1:]
        assert torch.equal(ours, theirs)


def test_grn_survives_fp16():
    x = torch.full((1, 64, 64, 8), 200.0, dtype=torch.float16)
    out = grn(x, torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    torch.testing.assert_close(out, torch.full_like(out, 400.0))


@pytest.mark.parametrize('use_grn', [False, True])
def test_other_ways_to_differentiate(use_grn):
    """torch.func and forward mode, by default as with plain PyTorch."""
    torch.manual_seed(0)
    model = ConvNeXt(SMALL, use_grn=use_grn).double()
    plain = ConvNeXt(SMALL, use_grn=use_grn, impl='eager').double()
    plain.load_state_dict(model.state_dict())
    x, v = torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)
    for run in (
        lambda m: torch.func.jvp(lambda x: m(x)[0], (x,), (v,))[1],
        lambda m: torch.func.grad(lambda x: m(x)[0].pow(3).sum())(x),
    ):
        assert run(plain).abs().sum() > 0
        torch.testing.assert_close(run(model), run(plain))


def test_converts_to_onnx_with_changing_sizes(tmp_path):
    try:
        torch.onnx.export(
            ConvNeXt(SMALL).eval(),
            (torch.rand(1, 3, 64, 64),),
            str(tmp_path / 'model.onnx'),
            dynamo=False,
            input_names=['x'],
            dynamic_axes={'x': {2: 'height', 3: 'width'}},
        )
    except Exception as error:
        # Asked for after all operators were converted, to write the file.
        if 'onnx is not installed' not in str(error):
            raise


def test_get_layer_depth():
    model = ConvNeXt('tiny')
    assert model.get_layer_depth('stages.2.8.gamma') == (5, 8)
    assert model.get_layer_depth('backbone.norm3.bias', 'backbone.') == (7, 8)
    assert model.get_layer_depth('neck.conv.bias', 'backbone.') == (7, 8)


@pytest.mark.slow
def test_import_needs_no_head_library():
    code = (
        'import sys, convnext_mm, convnext_mm.models.convnext\n'
        'heads = {"mmcv", "mmdet", "mmseg", "mmpretrain"}\n'
        'print(heads & {m.split(".")[0] for m in sys.modules})'
    )
    assert repo.run(warm_python(), '-c', code).strip().endswith('set()')


@pytest.mark.parametrize(
    'settings, error, words',
    [
        (
            dict(out_layout='nhwc'),
            ValueError,
            ['out_layout', "'contiguous', 'channels_last'", "'nhwc'"],
        ),
        (dict(arch='huuge'), ValueError, ["'huuge'", 'tiny', 'depths=']),
        (dict(arch=3), TypeError, ['arch', '3']),
        (dict(arch=dict(depths=[1, 1, 1, 1])), ValueError, ['channels']),
        (
            dict(arch=dict(depths=[1, 1, 1], channels=[8, 8, 8, 8])),
            ValueError,
            ['depths', '4', '[1, 1, 1]'],
        ),
        (
            dict(arch=dict(depths=[1, 1, 1, 1], channels=[8, 8])),
            ValueError,
            ['channels', '[8, 8]'],
        ),
        (
            dict(arch=dict(depths=[1, 0, 1, 1], channels=[8] * 4)),
            ValueError,
            ['depths', '0'],
        ),
        (
            dict(arch=dict(depths=[1, 1, 1, 1.5], channels=[8] * 4)),
            TypeError,
            ['depths', '1.5'],
        ),
        (dict(out_indices=4), ValueError, ['out_indices', '4', '[-4, 3]']),
        (dict(out_indices=(0, -5)), ValueError, ['out_indices', '-5']),
        (dict(out_indices=()), ValueError, ['out_indices']),
        (dict(out_indices=(3, -1)), ValueError, ['out_indices', 'twice']),
        (dict(out_indices=('a',)), TypeError, ['out_indices', "'a'"]),
        (dict(frozen_stages=5), ValueError, ['frozen_stages', '5', '[-1, 4]']),
        (dict(frozen_stages=1.5), TypeError, ['frozen_stages', '1.5']),
        (dict(drop_path_rate=1.0), ValueError, ['drop_path_rate', '1.0']),
        (dict(drop_path_rate=-0.1), ValueError, ['drop_path_rate', '-0.1']),
        (dict(drop_path_rate='0.1'), TypeError, ['drop_path_rate', "'0.1'"]),
        (
            dict(layer_scale_init_value=float('nan')),
            ValueError,
            ['layer_scale_init_value'],
        ),
        (dict(impl='cuda'), ValueError, ['impl', "'cuda'", 'eager']),
        (dict(in_channels=0), ValueError, ['in_channels', '0']),
        (dict(kernel_size=4), ValueError, ['kernel_size', 'odd', '4']),
        (dict(mlp_ratio=0), ValueError, ['mlp_ratio', '0']),
        (dict(norm_eps=0), ValueError, ['norm_eps', '0']),
        (dict(norm_cfg=dict(type='BN')), ValueError, ['norm_cfg', 'BN', 'LN2d']),
        (dict(act_cfg=dict(type='ReLU')), ValueError, ['act_cfg', 'ReLU']),
        (dict(linear_pw_conv=False), ValueError, ['linear_pw_conv', 'False']),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error) as caught:
        ConvNeXt(**settings)
    for word in words:
        assert word in str(caught.value), caught.value


def test_mmpretrain_defaults_are_accepted():
    model = ConvNeXt(
        SMALL,
        norm_cfg=dict(type='LN2d', eps=1e-6),
        act_cfg=dict(type='GELU'),
        linear_pw_conv=True,
    )
    dims = dict(depths=SMALL['depths'], dims=SMALL['channels'])
    assert ConvNeXt(dims).channels == model.channels


def stock_models(library):
    """Models with mmpretrain's ConvNeXt of the configs that a library is installed
    with. Their networks are small, all else is as it stands there."""
    pytest.importorskip('mmpretrain.models')
    root = Path(pytest.importorskip(library).__file__).parent
    for path in sorted(root.glob('.mim/configs/*/*convnext*.py')):
        model = Config.fromfile(path).model.to_dict()
        if model['backbone']['type'] in ('ConvNeXt', 'mmpretrain.ConvNeXt'):
            model['backbone'].update(arch=SMALL, init_cfg=None)
            yield path.name, model


def equal(peer, ours, x):
    randomise(peer)
    ours.load_state_dict(peer.state_dict())
    ours.eval()
    with torch.no_grad():
        outs = zip(ours(x), peer(x), strict=True)
        return all(relative(ours, theirs) < 1e-5 for ours, theirs in outs)


@pytest.mark.slow
@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_stock_detectors_and_segmentors_change_in_their_type_line(library):
    models = dict(stock_models(library))
    assert len(models) >= 4
    for name, model in models.items():
        peer = MODELS.build(model['backbone'])
        ours = MODELS.build({**model['backbone'], 'type': 'convnext_mm.ConvNeXt'})
        assert equal(peer, ours, torch.rand(1, 3, 64, 67)), name


@pytest.mark.slow
def test_stock_classifiers_need_two_settings_more():
    """Of which their configs do not speak: mmpretrain's defaults are a classifier's,
    ours a detector's."""
    models = dict(stock_models('mmpretrain'))
    assert len(models) >= 27
    x = torch.rand(2, 3, 64, 67)
    for name, model in models.items():
        model['head']['in_channels'] = SMALL['channels'][-1]
        backbone = {**model['backbone'], 'type': 'convnext_mm.ConvNeXt'}
        pooled = dict(backbone, gap_before_final_norm=True, out_indices=-1)
        peer, type_only, ours = (
            MODELS.build(dict(model, backbone=b, _scope_='mmpretrain'))
            for b in (model['backbone'], backbone, pooled)
        )
        with pytest.raises(RuntimeError):
            type_only(x)
        assert equal(peer, ours, x), name


@pytest.mark.parametrize(
    'x, error, words',
    [
        (torch.rand(1, 4, 64, 64), ValueError, ['(N, 3, H, W)', 'in_channels']),
        (torch.rand(3, 64, 64), ValueError, ['(3, 64, 64)']),
        (torch.rand(1, 3, 31, 64), ValueError, ['32 x 32', '31 x 64']),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, ['uint8']),
        ([1, 2], TypeError, ['list']),
    ],
)
def test_bad_input(x, error, words):
    with pytest.raises(error) as caught:
        ConvNeXt(SMALL)(x)
    for word in words:
        assert word in str(caught.value), caught.value
