_base_ = './convnext-base_16xb32_in1k-384px.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.95,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_large_1k_224_ema.pth')),
    head=dict(in_channels=1536))
