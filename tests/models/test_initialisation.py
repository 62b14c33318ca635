"""Training from scratch: padding must not blow the gradients up."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import repo
from convnext_mm import ConvNeXt
from toys import ARCH, segmentor

STEM_BIAS = 'downsample_layers.0.0.bias'
DEMO = Config.fromfile(
    f'{repo.ROOT}/configs/_base_/models/upernet_convnext-atto_narrow.py'
).model.backbone.init_cfg
MMPRETRAIN = [
    dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0),
    dict(type='Constant', layer=['LayerNorm'], val=1.0, bias=0.0),
]
PADDINGS = {
    'right third': (..., slice(64, None)),
    'bottom third': (..., slice(43, None), slice(None)),
    'bottom half': (..., slice(32, None), slice(None)),
    'most of one image': (1, slice(None), slice(16, None)),
    'three quarters': (..., slice(32, None), slice(32, None)),
}


def build(seed=0, arch='atto', **settings):
    torch.manual_seed(seed)
    model = ConvNeXt(arch, **settings)
    model.init_weights()
    return model


def gradient_norm(model, images):
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    sum(
        (y * torch.randn(y.shape, generator=generator)).mean() for y in model(images)
    ).backward()
    return total_norm(model)


def total_norm(model):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), float('inf')).item()


def growth(model, paddings=PADDINGS, seed=0):
    """Norm of all gradients with each padding over that without."""
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    whole = gradient_norm(model, images)
    norms = {}
    for name in paddings:
        padded = images.clone()
        padded[PADDINGS[name]] = 0
        norms[name] = gradient_norm(model, padded) / whole
    return norms


@pytest.mark.slow
@pytest.mark.parametrize('seed, impl', enumerate(['eager', 'lean']))
@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(layer_scale_init_value=1.0),
        dict(use_grn=True),
        dict(layer_scale_init_value=1.0, init_cfg=DEMO),
        dict(use_grn=True, init_cfg=DEMO),
        dict(init_cfg=MMPRETRAIN),
    ],
    ids=['V1', 'layer scale', 'V2', 'demo', 'demo V2', 'mmpretrain'],
)
def test_padding_leaves_gradients_as_large_as_without(settings, seed, impl):
    norms = growth(build(seed, impl=impl, **settings), seed=seed)
    assert max(norms.values()) < 2, norms


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_padding_leaves_gradients_of_wide_networks(arch):
    model = build(arch=arch, layer_scale_init_value=1.0, init_cfg=DEMO)
    norms = growth(model, ['right third', 'bottom half'])
    assert max(norms.values()) < 2, norms


@pytest.mark.parametrize('use_grn', [False, True], ids=['V1', 'V2'])
def test_padding_leaves_gradients_of_narrow_networks(use_grn):
    settings = dict(arch=ARCH, layer_scale_init_value=1.0, use_grn=use_grn)
    for init_cfg in (None, DEMO, MMPRETRAIN):
        norms = growth(build(init_cfg=init_cfg, **settings))
        assert max(norms.values()) < 4, norms


def test_a_bias_of_zero_would_blow_them_up():
    """The images of this file show what they are for."""
    model = build(arch=ARCH, init_cfg=DEMO, layer_scale_init_value=1.0)
    torch.nn.init.zeros_(model.get_parameter(STEM_BIAS))
    assert growth(model, ['right third'])['right third'] > 1e5


@pytest.mark.slow
def test_padding_by_a_data_preprocessor():
    pytest.importorskip('mmseg')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    init_default_scope('mmseg')
    torch.manual_seed(0)
    backbone = dict(
        type='convnext_mm.ConvNeXt',
        arch=ARCH,
        layer_scale_init_value=1.0,
        init_cfg=DEMO,
    )
    config = segmentor(backbone)
    config['data_preprocessor'].update(
        size=(64, 160), mean=[127.0] * 3, std=[57.0] * 3, seg_pad_val=255
    )
    model = MODELS.build(config)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 64, 160), dtype=torch.uint8, generator=generator)
    norms = []
    for width in (160, 48):
        # The same for both: gradients of opposite ones would cancel.
        labels = [torch.ones(1, 64, w, dtype=torch.long) for w in (160, width)]
        data = dict(
            inputs=[images[0], images[1, :, :, :width]],
            data_samples=[
                SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels
            ],
        )
        data = model.data_preprocessor(data, True)
        assert data['inputs'].shape == (2, 3, 64, 160)
        assert width == 160 or not data['inputs'][1, :, :, width:].any()
        model.zero_grad()
        model.parse_losses(model(**data, mode='loss'))[0].backward()
        norms.append(total_norm(model.backbone))
    assert norms[1] < 10 * norms[0], norms


@pytest.mark.parametrize('settings', [{}, dict(in_channels=12, stem_patch_size=2)])
def test_only_the_stem_starts_with_a_bias(settings):
    for init_cfg in (None, DEMO, MMPRETRAIN):
        model = build(arch=ARCH, init_cfg=init_cfg, **settings)
        for name, param in model.named_parameters():
            if name == STEM_BIAS:
                bound = 48**-0.5
                assert bound / 3 < param.std() < bound and param.abs().max() <= bound
            elif name.endswith('bias'):
                assert not param.any(), name
        assert model.init_cfg == init_cfg


@pytest.mark.parametrize('value', [0.0, 0.25])
def test_loaded_weights_stay_bit_for_bit(tmp_path, value):
    """Even those of a checkpoint whose stem bias is constant."""
    state = build(1, ARCH).state_dict()
    state[STEM_BIAS].fill_(value)
    path = tmp_path / 'weights.pth'
    torch.save(state, path)
    pretrained = dict(type='Pretrained', checkpoint=str(path))
    for init_cfg in (pretrained, [pretrained, DEMO], [*MMPRETRAIN, pretrained]):
        loaded = build(2, ARCH, init_cfg=init_cfg).state_dict()
        assert all(torch.equal(loaded[k], state[k]) for k in state)
    model = build(2, ARCH)
    model.load_state_dict(state)
    model.init_weights()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_bias_that_is_not_constant_stays():
    init_cfg = dict(type='Kaiming', layer='Linear')  # no convolution
    torch.manual_seed(0)
    model = ConvNeXt(ARCH, init_cfg=init_cfg)
    before = model.get_parameter(STEM_BIAS).clone()
    model.init_weights()
    assert torch.equal(model.get_parameter(STEM_BIAS), before)
