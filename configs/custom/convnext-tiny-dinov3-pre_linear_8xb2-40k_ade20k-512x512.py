# Linear probing of DINOv3 weights for semantic segmentation: the backbone is
# frozen, one 1x1 convolution reads its four maps, resized to the first and stacked.
# The norm of each map learns with it: its gain and shift are linear, too. Nothing
# is published or tuned.
_base_ = '../upernet/convnext-tiny-dinov3-pre_upernet_8xb2-amp-160k_ade20k-512x512.py'

max_iters = 40000
model = dict(
    backbone=dict(frozen_stages=4),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=1440,  # the sum of in_channels
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=150,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
    auxiliary_head=None,
)

train_cfg = dict(max_iters=max_iters, val_interval=4000)
# No layer decay: what is left of the backbone learns as the head does.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3), paramwise_cfg=dict(decay_rate=1.0, num_layers=None)
)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = max_iters + 1
default_hooks = dict(checkpoint=dict(interval=4000))
