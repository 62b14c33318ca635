"""The same weights in other libraries' backbones give the same maps."""

import pytest
import torch

from convnext_mm import ConvNeXt, convert_state_dict

DEPTHS, CHANNELS = [1, 2, 3, 1], [16, 24, 32, 40]
ARCH = dict(depths=DEPTHS, channels=CHANNELS)
SIZES = [(64, 96), (67, 93)]


def mmpretrain_model(use_grn):
    from mmpretrain.models import ConvNeXt as Peer

    # Its default leaves layer scale in V2; the published V2 has none.
    peer = Peer(
        ARCH,
        use_grn=use_grn,
        out_indices=[0, 1, 2, 3],
        layer_scale_init_value=0 if use_grn else 1e-6,
        gap_before_final_norm=False,
    )
    return peer, peer


def timm_model(use_grn):
    import timm

    peer = timm.create_model(
        'convnextv2_tiny' if use_grn else 'convnext_tiny',
        num_classes=0,
        depths=DEPTHS,
        dims=CHANNELS,
    )

    def features(x):
        return peer.forward_intermediates(x, intermediates_only=True)

    return peer, features


def torchvision_model(use_grn):
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Peer

    peer = Peer(
        [
            CNBlockConfig(c, o, d)
            for c, o, d in zip(CHANNELS, [*CHANNELS[1:], None], DEPTHS)
        ]
    )

    def features(x):
        outs = []
        for i, layer in enumerate(peer.features):
            x = layer(x)
            outs += [x] if i % 2 else []
        return outs

    return peer, features


def transformers_model(use_grn):
    transformers = pytest.importorskip('transformers', minversion='4.53')

    name = 'ConvNextV2' if use_grn else 'ConvNext'
    config = getattr(transformers, f'{name}Config')(
        depths=DEPTHS, hidden_sizes=CHANNELS
    )
    # transformers pads nothing and rounds down, as we do.
    peer = getattr(transformers, f'{name}Model')(config)

    def features(x):
        return peer(x, output_hidden_states=True).hidden_states[1:]

    return peer, features


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
    'library, use_grn',
    [
        ('mmpretrain', False),
        ('mmpretrain', True),
        ('timm', False),
        ('timm', True),
        ('torchvision', False),  # has V1 only
        ('transformers', False),
        ('transformers', True),
    ],
)
def test_same_weights_same_maps_and_gradients(library, use_grn, size):
    pytest.importorskip(library)
    torch.manual_seed(0)
    peer, features = globals()[f'{library}_model'](use_grn)
    with torch.no_grad():  # weights at which every part matters
        for name, param in peer.named_parameters():
            param.copy_(
                0.3 * torch.randn_like(param)
                + (name.endswith('weight') and param.ndim == 1)
            )
    peer.eval()
    # mmpretrain norms its maps; the others' norms come after what they emit.
    has_norms = library == 'mmpretrain'
    model = ConvNeXt(ARCH, use_grn=use_grn, out_norm=has_norms, norm_eps=1e-6).eval()
    state, _ = convert_state_dict(peer.state_dict())
    report = model.load_state_dict(state, strict=False)
    assert not report.missing_keys, report

    results = []
    for run in (model, features):
        x = torch.rand(
            2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ).requires_grad_()
        (model if run is model else peer).double()
        outs = run(x)
        assert len(outs) == 4
        sum(
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
            for y in outs
        ).backward()
        results.append((*outs, x.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
