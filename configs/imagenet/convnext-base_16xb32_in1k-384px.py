# From 224 x 224, classifier included (so the published scaling of a new one,
# 0.001, has nothing to scale). No Mixup, no CutMix.
_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_384.py',
    '../_base_/schedules/adamw_imagenet_finetune-30e.py',
    'mmpretrain::_base_/default_runtime.py',
]

checkpoint = 'https://dl.fbaipublicfiles.com/convnext/convnext_base_1k_224_ema.pth'
model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.8,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    head=dict(
        in_channels=1024,
        init_cfg=dict(
            _delete_=True,
            type='convnext_mm.ReleasedClassifierInit',
            checkpoint=checkpoint,
        ),
    ),
    train_cfg=None,
)

train_dataloader = dict(batch_size=32)
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7))
