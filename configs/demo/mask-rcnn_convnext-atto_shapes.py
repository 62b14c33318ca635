# Mask R-CNN that trains from scratch on a CPU in minutes, 192-pixel images.
_base_ = [
    '../_base_/models/mask-rcnn_convnext-atto_narrow.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/adamw_scratch.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=5), mask_head=dict(num_classes=5))
)

default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
