_base_ = './convnext-base_16xb32_in1k-384px.py'

checkpoint = 'https://dl.fbaipublicfiles.com/convnext/convnext_large_1k_224_ema.pth'
model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.95,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(in_channels=1536, init_cfg=dict(checkpoint=checkpoint)),
)
