_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_sketch.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='base'), head=dict(in_channels=1024))
