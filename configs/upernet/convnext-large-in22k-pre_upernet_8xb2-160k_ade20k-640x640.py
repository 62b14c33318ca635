_base_ = './convnext-base-in22k-pre_upernet_8xb2-amp-160k_ade20k-640x640.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_large_22k_224.pth',
        ),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)

# In full precision, as published.
optim_wrapper = dict(type='OptimWrapper')
