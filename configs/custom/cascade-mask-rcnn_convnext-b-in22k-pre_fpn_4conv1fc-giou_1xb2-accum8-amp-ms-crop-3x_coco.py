# The published recipe on one GPU: 8 batches of 2 images for a step, so that the
# learning rate stays. Written with 24 GB in mind; no GPU has measured its memory.
# with_cp keeps the input of each block alone, lean+ little of the one that backward
# is at: see docs/recipes.md.
_base_ = (
    '../cascade/cascade-mask-rcnn_convnext-b-in22k-pre_fpn_4conv1fc-giou_'
    '8xb2-amp-ms-crop-3x_coco.py'
)

accumulated = 8
model = dict(backbone=dict(with_cp=True, impl='lean+'))

optim_wrapper = dict(accumulative_counts=accumulated)
# Schedulers count batches, not steps: the published 500 steps of warm-up.
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 500 * accumulated + 1
