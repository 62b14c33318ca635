# The same on DINOv3 weights. They are gated: accept the licence on the model's
# page first.
_base_ = (
    './mask-rcnn_convnext-v2-t-d16-fcmae-pre_simple-pyramid_8xb4-amp-lsj-3x_coco.py'
)

model = dict(
    backbone=dict(
        use_grn=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-tiny-pretrain-lvd1689m',
        ),
    )
)
