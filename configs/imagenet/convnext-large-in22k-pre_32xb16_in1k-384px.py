_base_ = './convnext-base-in22k-pre_32xb16_in1k-384px.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_large_22k_224.pth',
        ),
    ),
    head=dict(in_channels=1536),
)
