# ImageNet-22K at 224 x 224, the augmentation of ImageNet-1K, no validation set.
_base_ = './imagenet_224.py'

data_root = 'data/imagenet22k'
data_preprocessor = dict(num_classes=21841)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ImageNet21k',
        data_root=data_root,
        split='train',
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = None
val_evaluator = None
test_dataloader = None
test_evaluator = None
