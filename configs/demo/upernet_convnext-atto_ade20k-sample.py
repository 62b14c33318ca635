# The same small UPerNet on three real images of ADE20K, which it learns by
# heart: sliding-window test and all 150 classes, as in the full recipes.
_base_ = [
    '../_base_/models/upernet_convnext-atto_narrow.py',
    '../_base_/datasets/ade20k_sample.py',
    '../_base_/schedules/adamw_cpu-60it.py',
    '../_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(mode='slide', crop_size={{_base_.crop_size}}, stride=(85, 85)),
)

default_hooks = dict(
    logger=dict(interval=5), checkpoint=dict(interval=30, max_keep_ckpts=1)
)
