# From ImageNet-22K. The new classifier starts at a thousandth of the usual
# size; no Mixup, no CutMix.
_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/adamw_imagenet_finetune-30e.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_base_22k_224.pth',
        ),
    ),
    head=dict(
        in_channels=1024,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02 * 0.001),
    ),
    train_cfg=None,
)

train_dataloader = dict(batch_size=32)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.8))
