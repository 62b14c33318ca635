# Settings: see tiny. Drop path 0.3 is our choice from the published set.
_base_ = './convnext-v2-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/im1k/convnextv2_base_1k_224_ema.pt',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
