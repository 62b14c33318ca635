# Settings: see tiny. Drop path 0.4 is our choice from the published set.
_base_ = './convnext-v2-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/im1k/convnextv2_huge_1k_224_ema.pt',
        ),
    ),
    decode_head=dict(in_channels=[352, 704, 1408, 2816]),
    auxiliary_head=dict(in_channels=1408),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
