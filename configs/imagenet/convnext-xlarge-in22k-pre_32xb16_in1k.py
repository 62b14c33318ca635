_base_ = './convnext-base-in22k-pre_16xb32_in1k.py'

model = dict(
    backbone=dict(
        arch='xlarge',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_xlarge_22k_224.pth',
        ),
    ),
    head=dict(in_channels=2048),
)

train_dataloader = dict(batch_size=16)

# The average of weights is what was published for xlarge alone.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
