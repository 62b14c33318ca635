# Linear probing of DINOv3 weights for classification: the backbone is frozen, one
# linear layer learns (with the norm before it, whose gain and shift are linear, too)
# on random crops and flips. Schedule and batch are those of MMPretrain for linear
# probing of a ResNet-50. Nothing is published or tuned.
_base_ = [
    '../_base_/models/classifier_convnext.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/schedules/imagenet_sgd_coslr_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]

data_root = 'data/imagenet'
model = dict(
    backbone=dict(
        frozen_stages=4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-tiny-pretrain-lvd1689m',
        ),
    ),
    head=dict(loss=dict(_delete_=True, type='CrossEntropyLoss')),
    train_cfg=None,
)

# This constructor, for it leaves out what is frozen; rate 1 is no layer decay.
optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(decay_rate=1.0),
)
