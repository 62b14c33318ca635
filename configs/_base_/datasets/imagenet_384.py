# ImageNet-1K at 384 x 384; for testing images are warped, not cropped.
_base_ = './imagenet_224.py'

train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 384
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
