_base_ = [
    '../_base_/models/classifier_convnext.py',
    '../_base_/datasets/imagenet_a.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(backbone=dict(arch='xlarge'), head=dict(in_channels=2048))
test_pipeline = _base_.pipeline_384
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
