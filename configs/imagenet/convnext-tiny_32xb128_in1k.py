_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/schedules/adamw_imagenet_300e.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='tiny', drop_path_rate=0.1))
