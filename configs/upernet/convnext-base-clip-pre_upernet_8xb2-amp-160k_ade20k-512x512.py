# CLIP image tower, trained on LAION-2B. Our choice, for no recipe is published:
# V1's UPerNet recipe of this size, with nothing tuned.
_base_ = './convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    # CLIP's normalisation of images, not ImageNet's.
    data_preprocessor=dict(
        mean=[122.771, 116.746, 104.094], std=[68.500, 66.632, 70.323]
    ),
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained', checkpoint='timm://convnext_base.clip_laion2b_augreg'
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
