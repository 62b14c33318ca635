# Mask R-CNN that trains from scratch on a CPU in minutes: the smallest
# ConvNeXt, narrow heads, 192-pixel images.
_base_ = [
    '../_base_/models/mask-rcnn_convnext_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    'mmdet::_base_/default_runtime.py'
]

width = 64
norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(arch='atto'),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=width,
        norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead',
            in_channels=width,
            conv_out_channels=width,
            norm_cfg=norm_cfg,
            fc_out_channels=256,
            num_classes=5),
        mask_roi_extractor=dict(out_channels=width),
        mask_head=dict(
            num_convs=2,
            in_channels=width,
            conv_out_channels=width,
            norm_cfg=norm_cfg,
            num_classes=5)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))

max_iters = 1500
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# From scratch there is nothing to preserve, so no layer decay: rate 1.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=1.0),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=100,
        end=max_iters,
        eta_min=1e-5)
]
randomness = dict(seed=0)
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
