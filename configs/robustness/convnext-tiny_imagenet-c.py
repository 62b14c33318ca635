_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_c.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='tiny'))
