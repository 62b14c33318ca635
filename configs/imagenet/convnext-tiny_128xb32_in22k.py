_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet22k_224.py',
    '../_base_/schedules/adamw_imagenet22k_90e.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(arch='tiny', drop_path_rate=0.0), head=dict(num_classes=21841)
)

train_dataloader = dict(batch_size=32)
