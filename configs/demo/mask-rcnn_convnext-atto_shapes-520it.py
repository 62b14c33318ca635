# The first look, `make demo`: a quarter of the images that the long one sees, in
# smaller steps of half as many regions.
_base_ = './mask-rcnn_convnext-atto_shapes.py'

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=1)),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))),
)

train_dataloader = dict(batch_size=2)
max_iters = 520
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=1e-5
    ),
]
default_hooks = dict(logger=dict(interval=40), checkpoint=dict(interval=max_iters))
