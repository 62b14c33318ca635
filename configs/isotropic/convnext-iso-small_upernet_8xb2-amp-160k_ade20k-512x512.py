# Isotropic ConvNeXt with a simple pyramid. Nothing is published for it in dense tasks:
# settings are those of ConvNeXt-T, drop path that of its pretraining.
_base_ = '../upernet/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.IsotropicConvNeXt',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_iso_small_1k_224_ema.pth',
        ),
    ),
    neck=dict(type='convnext_mm.SimplePyramid', in_channels=384),
    decode_head=dict(in_channels=[96, 192, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=None))  # one for each block
