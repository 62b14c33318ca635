# UPerNet that trains from scratch on a CPU in minutes: the smallest ConvNeXt,
# narrow heads, 192-pixel images.
_base_ = [
    '../_base_/models/upernet_convnext-atto_narrow.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/adamw_scratch.py',
    '../_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(192, 192), test_cfg=dict(size_divisor=32)),
    decode_head=dict(num_classes=6),
    auxiliary_head=dict(num_classes=6),
)

max_iters = 1600
train_cfg = dict(max_iters=max_iters, val_interval=400)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=1e-5
    ),
]
default_hooks = dict(checkpoint=dict(interval=400, max_keep_ckpts=1))
