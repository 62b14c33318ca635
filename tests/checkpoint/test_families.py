"""Weights of every family give the features that their own library computes."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from convnext_mm import CheckpointError, ConvNeXt, convert_state_dict, load_checkpoint
from convnext_mm.checkpoint import (
    CheckpointFileError,
    CheckpointMismatchError,
    UnknownCheckpointError,
)
from convnext_mm.checkpoint.convert import convert
from convnext_mm.checkpoint.families import FAMILIES, layer_names
from convnext_mm.checkpoint.load import read_network
from toys import randomise

TOLERANCE = 1e-5
DEPTHS, CHANNELS = [2, 1, 3, 1], [16, 8, 24, 40]
SAMPLES = {
    'dinov3.pth': ('dinov3', False),
    'fcmae_v2.pt': ('fcmae', True),
    'hf_convnext.safetensors': ('huggingface', False),
    'hf_convnextv2.safetensors': ('huggingface', True),
    'hf_dinov3.safetensors': ('huggingface_dinov3', False),
    'mmengine_runner.pth': ('paper', False),
    'mmpretrain_v1_cls.pth': ('mmpretrain', False),
    'mmpretrain_v1_detector.pth': ('mmpretrain', False),
    'mmpretrain_v1_segmentor.pth': ('mmpretrain', False),
    'mmpretrain_v2_cls.pth': ('mmpretrain', True),
    'official_v1_cls.pth': ('paper', False),
    'official_v1_detector.pth': ('paper', False),
    'official_v1_segmentor.pth': ('paper', False),
    'official_v1_training.pth': ('paper', False),
    'official_v2_cls.pt': ('paper', True),
    'open_clip.pth': ('open_clip', False),
    'timm_v1.pth': ('timm', False),
    'timm_v1_conv_mlp.pth': ('timm', False),
    'timm_v1_safetensors.safetensors': ('timm', False),
    'timm_v2.pth': ('timm', True),
    'torchvision.pth': ('torchvision', False),
}


def reset_norms(model: nn.Module) -> None:
    for i in range(4):
        getattr(model, f'norm{i}').reset_parameters()


def build(report, **settings) -> ConvNeXt:
    spec = report.spec
    return ConvNeXt(
        dict(depths=spec.depths, channels=spec.channels),
        use_grn=spec.use_grn,
        **settings,
    ).eval()


def largest_error(ours, theirs) -> float:
    assert len(ours) == len(theirs)
    errors = [(a - torch.as_tensor(b)).abs().max() for a, b in zip(ours, theirs)]
    return float(torch.stack(errors).max())  # NaN stays NaN


@pytest.mark.parametrize('name', SAMPLES)
def test_sample_file(name, shared_dir, record):
    folder = shared_dir / 'reference' / 'checkpoints'
    _, report = read_network(folder / name)
    assert (report.family.name, report.spec.use_grn) == SAMPLES[name]
    assert report.averaged == (name == 'official_v1_training.pth')
    assert 'unknown' not in report.leftovers

    expected = np.load(folder / 'expected.npz')
    image = torch.from_numpy(expected['input'])
    stem = name.rsplit('.', 1)[0]
    expected = [expected[f'{stem}/out{i}'] for i in range(4)]
    model = build(
        report, init_cfg=dict(type='Pretrained', checkpoint=str(folder / name))
    )
    model.init_weights()
    reset_norms(model)
    with torch.no_grad():
        error = largest_error(model(image), expected)

    model = build(report)
    state = load_checkpoint(folder / name)
    model.load_state_dict(state, strict=False)
    reset_norms(model)
    with torch.no_grad():
        error = max(error, largest_error(model(image), expected))
    record(
        'checkpoint_samples', name, dict(family=report.family.name, largest_error=error)
    )
    assert error <= TOLERANCE


def test_detector_with_its_own_norms(shared_dir, record):
    folder = shared_dir / 'reference' / 'checkpoints'
    path = folder / 'official_v1_detector.pth'
    model = build(
        read_network(path)[1], init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    model.init_weights()
    expected = np.load(folder / 'official_v1_detector_outputs.npz')
    image = torch.from_numpy(np.load(folder / 'expected.npz')['input'])
    with torch.no_grad():
        error = largest_error(model(image), [expected[f'out{i}'] for i in range(4)])
    record(
        'checkpoint_samples',
        'official_v1_detector.pth, own norms',
        dict(family='paper', largest_error=error),
    )
    assert error <= TOLERANCE


def in_turn(first, stages, image):
    outputs, x = [], first(image)
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


def make_timm(**settings):
    timm = pytest.importorskip('timm')
    model = timm.models.convnext.ConvNeXt(
        depths=DEPTHS, dims=CHANNELS, num_classes=7, **settings
    )
    return model, lambda image: in_turn(model.stem, model.stages, image)


def make_timm_features():
    timm = pytest.importorskip('timm')
    model = timm.create_model(
        'convnextv2_atto', features_only=True, depths=DEPTHS, dims=CHANNELS
    )
    return model, model


def make_open_clip():
    trunk, run = make_timm(conv_mlp=True)
    return nn.ModuleDict(
        dict(
            visual=nn.ModuleDict(
                dict(trunk=trunk, head=nn.ModuleDict(dict(proj=nn.Linear(40, 8))))
            ),
            text=nn.ModuleDict(dict(token_embedding=nn.Embedding(9, 8))),
        )
    ), run


def make_torchvision():
    convnext = pytest.importorskip('torchvision').models.convnext
    widths = [*CHANNELS[1:], None]
    model = convnext.ConvNeXt(
        [convnext.CNBlockConfig(*args) for args in zip(CHANNELS, widths, DEPTHS)],
        num_classes=7,
    )
    layers = model.features
    return model, lambda image: in_turn(
        layers[0], [layers[1], layers[2:4], layers[4:6], layers[6:8]], image
    )


def make_huggingface(name, version=''):
    transformers = pytest.importorskip('transformers', minversion='4.53')
    config = getattr(transformers, f'ConvNext{version}Config')(
        depths=DEPTHS,
        hidden_sizes=CHANNELS,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    model = getattr(transformers, f'ConvNext{version}{name}')(config)
    if name == 'Backbone':
        return model, lambda image: model(image).feature_maps
    return model, lambda image: model(image, output_hidden_states=True).hidden_states[
        1:
    ]


def make_huggingface_dinov3():
    transformers = pytest.importorskip('transformers', minversion='4.53')
    config = transformers.DINOv3ConvNextConfig(depths=DEPTHS, hidden_sizes=CHANNELS)
    model = transformers.DINOv3ConvNextModel(config)

    def run(image):
        outputs, x = [], image
        for stage in model.stages:
            for layer in (*stage.downsample_layers, *stage.layers):
                x = layer(x)
            outputs.append(x)
        return outputs

    return model, run


def make_mmpretrain(**settings):
    pytest.importorskip('mmpretrain')
    from mmpretrain.models import ConvNeXt as Reference

    model = Reference(
        dict(depths=DEPTHS, channels=CHANNELS),
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        **settings,
    )
    return model, model


LIBRARIES = {
    'timm V1': ('timm', make_timm),
    'timm V1, 1x1 convolutions': ('timm', partial(make_timm, conv_mlp=True)),
    'timm V2': ('timm', partial(make_timm, use_grn=True, ls_init_value=None)),
    'timm V2, 1x1 convolutions': (
        'timm',
        partial(make_timm, use_grn=True, ls_init_value=None, conv_mlp=True),
    ),
    'timm, head norm first': ('timm', partial(make_timm, head_norm_first=True)),
    'timm features_only V2': ('timm_features', make_timm_features),
    'OpenCLIP (timm trunk)': ('open_clip', make_open_clip),
    'torchvision': ('torchvision', make_torchvision),
    'HF ConvNext': ('huggingface', partial(make_huggingface, 'Model')),
    'HF ConvNext classifier': (
        'huggingface',
        partial(make_huggingface, 'ForImageClassification'),
    ),
    'HF ConvNext backbone': ('huggingface', partial(make_huggingface, 'Backbone')),
    'HF ConvNextV2': ('huggingface', partial(make_huggingface, 'Model', 'V2')),
    'HF DINOv3 ConvNext': ('huggingface_dinov3', make_huggingface_dinov3),
    'mmpretrain V1': ('mmpretrain', make_mmpretrain),
    'mmpretrain V2': (
        'mmpretrain',
        partial(make_mmpretrain, use_grn=True, layer_scale_init_value=0.0),
    ),
    'mmpretrain V1, 1x1 convolutions': (
        'mmpretrain',
        partial(make_mmpretrain, linear_pw_conv=False),
    ),
}


@pytest.mark.parametrize('library', LIBRARIES)
def test_library(library, record):
    family, make = LIBRARIES[library]
    reference, run = make()
    randomise(reference)
    state, name = convert_state_dict(reference.state_dict())
    assert name == family
    report = convert(state)[1]
    has_norms = any(key.startswith('norm') for key in state)
    model = build(report, out_norm=has_norms, norm_eps=norm_eps(reference))
    model.load_state_dict(state)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        theirs = run(image)
        for feature in theirs:  # so that an error would show
            assert feature.isfinite().all() and feature.std() > 1e-3
        # Randomised weights amplify: the error counts relative to the values.
        error = max(
            largest_error([a], [b]) / max(1, float(b.abs().max()))
            for a, b in zip(model(image), theirs)
        )
    record('checkpoint_libraries', library, dict(family=family, largest_error=error))
    assert error <= TOLERANCE


def timm_variants():
    try:
        import timm
    except ImportError:
        return ['none']
    return timm.list_models('convnext*')


@pytest.mark.parametrize('name', timm_variants())
def test_timm_variant(name):
    """Those of plain ConvNeXts load; others are refused with the reason."""
    timm = pytest.importorskip('timm')
    reference = randomise(
        timm.create_model(name, depths=DEPTHS, dims=CHANNELS, num_classes=7)
    )
    state = reference.state_dict()
    model = ConvNeXt(
        dict(depths=DEPTHS, channels=CHANNELS),
        use_grn='v2' in name,
        norm_eps=norm_eps(reference),
    ).eval()
    reasons = [
        reason
        for part, reason in (('_ols', 'overlapping stem'), ('_rms', 'RMSNorm'))
        if part in name
    ]
    if reasons:
        for load in (convert_state_dict, model.load_state_dict):
            with pytest.raises(CheckpointMismatchError) as error:
                load(state)
            assert all(reason in str(error.value) for reason in reasons)
        return
    model.load_state_dict(state, strict=False)
    image = torch.rand(1, 3, 64, 96)
    expected = in_turn(reference.stem, reference.stages, image)
    if '_hnf' in name:  # its last norm is the output norm of the last stage
        expected[3] = reference.norm_pre(expected[3])
        for i in range(3):
            delattr(model, f'norm{i}')
    else:
        for i in range(4):
            delattr(model, f'norm{i}')
    with torch.no_grad():
        for ours, theirs in zip(model(image), expected):
            scale = max(1, float(theirs.abs().max()))
            assert largest_error([ours], [theirs]) <= TOLERANCE * scale


@pytest.mark.parametrize('stem', ['overlap', 'overlap_tiered', 'overlap_act'])
@pytest.mark.parametrize('make', ['plain', 'features_only'])
def test_overlapping_stem(stem, make, log):
    timm = pytest.importorskip('timm')
    state = randomise(
        timm.create_model(
            'convnext_atto',
            stem_type=stem,
            depths=DEPTHS,
            dims=CHANNELS,
            features_only=make == 'features_only',
        )
    ).state_dict()
    arch = dict(depths=DEPTHS, channels=CHANNELS)
    with pytest.raises(CheckpointMismatchError, match='overlapping stem'):
        convert_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match='overlapping stem'):
        ConvNeXt(arch).load_state_dict(state, strict=False)
    model = ConvNeXt(arch, allow_partial=True)
    model.load_state_dict(state, strict=False)
    assert any('overlapping stem' in line for line in log)
    assert model.stages[2][0].dwconv.weight.std() > 0.1


def timm_norm_first():
    model, _ = make_timm(head_norm_first=True)
    return randomise(model).state_dict()


def test_norm_before_pooling_is_an_output_norm(log):
    state = timm_norm_first()
    arch = dict(depths=DEPTHS, channels=CHANNELS)
    model = ConvNeXt(arch, out_indices=(1, 3))
    model.load_state_dict(state, strict=False)
    assert torch.equal(model.norm3.weight, state['norm_pre.weight'])
    assert sum('norm_pre' in line for line in log) == 1
    for settings in (
        dict(out_indices=2),
        dict(out_norm=False),
        dict(out_indices=2, gap_before_final_norm=True),
    ):
        ConvNeXt(arch, **settings).load_state_dict(state, strict=False)
    assert sum('final norm: norm_pre' in line for line in log) == 3
    assert not any(key.startswith('norm') for key in convert_state_dict(state)[0])


def test_norm_before_pooling_is_none_after_it(log):
    state = timm_norm_first()
    settings = dict(
        arch=dict(depths=DEPTHS, channels=CHANNELS), gap_before_final_norm=True
    )
    with pytest.raises(CheckpointMismatchError, match='gap_before_final_norm=False'):
        ConvNeXt(**settings).load_state_dict(state, strict=False)
    model = ConvNeXt(**settings, allow_partial=True)
    model.load_state_dict(state, strict=False)
    assert bool((model.norm3.weight == 1).all())
    assert any('gap_before_final_norm=False' in line for line in log)


def norm_eps(model: nn.Module) -> float:
    """eps of the first norm: libraries differ in it, checkpoints do not say."""
    return next(module.eps for module in model.modules() if hasattr(module, 'eps'))


def test_every_family_has_a_test():
    tested = {family for family, _ in SAMPLES.values()}
    tested |= {family for family, _ in LIBRARIES.values()}
    tested |= {'isotropic'}  # in tests/models/test_isotropic.py
    assert tested == {family.name for family in FAMILIES}


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w: dict(model=w),
        lambda w: dict(state_dict=w),
        lambda w: dict(model=dict(state_dict=w), epoch=3),
        lambda w: {f'module.{k}': t for k, t in w.items()},
        lambda w: {f'_orig_mod.{k}': t for k, t in w.items()},
        lambda w: {f'module._orig_mod.backbone.{k}': t for k, t in w.items()},
        lambda w: {f'encoder.{k}': t for k, t in w.items()},
        lambda w: dict(model={f'image_encoder.trunk.{k}': t for k, t in w.items()}),
    ],
)
def test_wrappers_and_prefixes_are_peeled(wrap, weights):
    state, family = convert_state_dict(wrap(weights))
    assert family == 'paper'
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert len(state) == len(weights)


@pytest.mark.parametrize('name', ['model_ema', 'state_dict_ema', 'ema'])
def test_averaged_copy_is_taken(name, weights):
    raw = {key: tensor + 1 for key, tensor in weights.items()}
    state, report = convert({'model': raw, name: weights})
    assert report.averaged
    assert torch.equal(state['norm0.bias'], weights['norm0.bias'])
    assert 'averaged copy' in report.headline()


def test_mmengine_saves_the_average_as_state_dict(weights):
    raw = {f'module.backbone.{k}': t + 1 for k, t in weights.items()}
    averaged = {f'backbone.{k}': t for k, t in weights.items()}
    state, _report = convert(dict(state_dict=averaged, ema_state_dict=raw))
    assert torch.equal(state['norm0.bias'], weights['norm0.bias'])


def test_several_networks_need_a_prefix(weights):
    both = {
        f'{name}.backbone.{key}': tensor + (name == 'teacher')
        for name in ('student', 'teacher')
        for key, tensor in weights.items()
    }
    with pytest.raises(ValueError, match='student.*teacher.*prefix='):
        convert(both)
    state, _ = convert(both, prefix='teacher.')
    assert torch.equal(state['norm0.bias'], weights['norm0.bias'] + 1)
    with pytest.raises(ValueError, match="behind prefix='nobody'.*student"):
        convert(both, prefix='nobody')


def in_names_of(family, weights):
    """The weights of a backbone of ours in another family's names."""
    family = next(row for row in FAMILIES if row.name == family)
    theirs = {ours: name for name, ours in layer_names(family).items()}
    return {theirs[name]: tensor for name, tensor in weights.items() if name in theirs}


@pytest.mark.parametrize('wrap', ['', 'module.backbone.', 'model_ema.'])
@pytest.mark.parametrize(
    'one, other',
    [
        ('paper', 'torchvision'),
        ('paper', 'mmpretrain'),
        ('timm', 'huggingface'),
        ('timm', 'timm_features'),
    ],
)
def test_two_families_in_one_place(one, other, wrap, weights):
    both = {
        wrap + key: tensor
        for family, names in (
            (one, weights),
            (other, {key: tensor + 1 for key, tensor in weights.items()}),
        )
        for key, tensor in in_names_of(family, names).items()
    }
    for prefix in (None, wrap):
        with pytest.raises(UnknownCheckpointError) as error:
            convert(both, prefix)
        assert one in str(error.value) and other in str(error.value)


def test_one_parameter_in_another_familys_name(weights):
    weights['stages.1.1.depthwise_conv.weight'] = weights.pop(
        'stages.1.1.dwconv.weight'
    )
    with pytest.raises(CheckpointMismatchError, match='1 parameters missing'):
        convert_state_dict(weights)
    weights['features.0.0.weight'] = torch.zeros(3)
    with pytest.raises(CheckpointMismatchError, match='1 parameters missing'):
        convert_state_dict(weights)


@pytest.mark.parametrize('depth', [6, 31, 32, 2000])
def test_dictionaries_in_dictionaries(depth, weights):
    for _ in range(depth):
        weights = dict(model=weights)
    if depth < 32:
        assert convert_state_dict(weights)[1] == 'paper'
    else:
        with pytest.raises(UnknownCheckpointError, match='deeper.*32'):
            convert_state_dict(weights)


@pytest.mark.parametrize(
    'name, escaped',
    [
        ('a\x1b[31mb', r'a\x1b[31mb'),
        ('a\nb', r'a\nb'),
        ('a\ud800', r'a\ud800'),
        ('a\u202eb', r'a\u202eb'),
        ('.' * 10**6, '1000 characters'),
    ],
)
@pytest.mark.parametrize('in_wrapper', [False, True])
def test_names_that_cannot_be_printed(name, escaped, in_wrapper, weights):
    weights[name] = dict(b=torch.ones(1)) if in_wrapper else torch.ones(1)
    with pytest.raises(CheckpointFileError) as error:
        convert_state_dict(weights)
    assert escaped in str(error.value)
    assert str(error.value).isprintable()


def test_long_names_take_no_long_time(weights):
    long = 'k' * 10**6
    weights.update({long[i:]: dict(epoch=i) for i in range(99)})
    weights.update({'.' * 900 + str(i): torch.ones(1) for i in range(9999)})
    assert convert_state_dict(weights)[1] == 'paper'


def nested(layout):
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(
    'make',
    [
        lambda: None,
        lambda: [1.0] * 8,
        lambda: np.ones(8),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(8, 0, 7, 7),
        lambda: torch.quantize_per_tensor(torch.ones(8), 1.0, 0, torch.quint8),
        lambda: torch.ones(8).to_sparse(),
        lambda: torch.eye(8).to_sparse_csr(),
        lambda: torch.ones(8).to_mkldnn(),
        lambda: torch.ones(8, device='meta'),
        lambda: torch.ones(8, dtype=torch.complex64),
        lambda: torch.ones(8, dtype=torch.uint16),
        lambda: torch.ones(8, dtype=torch.bool),
        lambda: nested(torch.strided),
        lambda: nested(torch.jagged),
        lambda: nn.parameter.UninitializedParameter(),
        lambda: torch.ones(1).expand(10**12),
        lambda: torch.ones(1).expand(10**6, 1, 1000, 1000),
    ],
)
def test_odd_values(make, weights):
    for name in (
        'stages.0.0.gamma',
        'stages.0.0.dwconv.weight',
        'downsample_layers.0.1.weight',
    ):
        with pytest.raises(CheckpointError):
            convert_state_dict({**weights, name: make()})
    for key in ('head.weight', 3, ('a',)):  # beside the network
        convert_state_dict({**weights, key: make()})


def test_cycle(weights):
    weights['a'] = dict(b=weights)
    assert convert_state_dict(weights)[1] == 'paper'
    empty = {}
    empty['a'] = dict(b=empty)
    with pytest.raises(UnknownCheckpointError, match='no tensors'):
        convert_state_dict(empty)


def test_expanded_tensors(weights):
    expanded = {
        name: torch.full((1,), 2.0).expand(tensor.shape)
        for name, tensor in weights.items()
    }
    state, _ = convert_state_dict(expanded)
    assert state['stages.0.0.gamma'].tolist() == [2.0] * 8
    # All at once: one storage, no tensor larger than it.
    shared = torch.ones(3000, 3000)
    weights.update(
        {f'stages.{s}.{b}.pwconv1.weight': shared for s in range(4) for b in range(64)}
    )
    with pytest.raises(CheckpointMismatchError, match='are expanded from'):
        convert_state_dict(weights)


def test_round_trip_through_our_format(tmp_path, weights):
    from safetensors.torch import save_file

    torch.save(weights, tmp_path / 'a.pth')
    torch.save(weights, tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / 'c.safetensors')
    for path in tmp_path.iterdir():
        state = load_checkpoint(path)
        assert list(state) == list(weights) or path.suffix == '.safetensors'
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    'dtype',
    [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_dtype_is_kept(dtype, weights):
    state, _ = convert_state_dict(
        {key: tensor.to(dtype) for key, tensor in weights.items()}
    )
    assert {tensor.dtype for tensor in state.values()} == {dtype}
