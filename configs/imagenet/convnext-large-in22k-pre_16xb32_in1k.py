_base_ = './convnext-base-in22k-pre_16xb32_in1k.py'

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
