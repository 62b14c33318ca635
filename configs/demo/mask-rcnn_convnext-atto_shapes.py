# Mask R-CNN that trains from scratch on a CPU in minutes, 192-pixel images.
_base_ = [
    '../_base_/models/mask-rcnn_convnext-atto_narrow.py',
    '../_base_/datasets/shapes_instance.py',
    'mmdet::_base_/default_runtime.py'
]

model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5)))

max_iters = 1000
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# From scratch there is nothing to preserve, so no layer decay: rate 1.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW',
        lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        fused=True),
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
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
