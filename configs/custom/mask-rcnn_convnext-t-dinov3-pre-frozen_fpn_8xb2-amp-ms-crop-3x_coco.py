# Mask R-CNN on a frozen backbone, for data too small to train it: only the norms
# of its maps, neck and heads learn. Nothing is published or tuned.
_base_ = '../mask_rcnn/mask-rcnn_convnext-t-dinov3-pre_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(backbone=dict(frozen_stages=4))

optim_wrapper = dict(paramwise_cfg=dict(num_layers=None))  # as many as arch has
