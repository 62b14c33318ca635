# Settings: see tiny. Drop path 0.4 is our choice from the published set.
_base_ = './convnext-v2-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/im1k/convnextv2_large_1k_224_ema.pt',
        ),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
