# RTMDet-Ins-l on DINOv3 weights. They are gated: accept the licence on the model's
# page first. Nothing is published or tuned.
_base_ = './rtmdet-ins-l_convnext-b_4xb32-100e_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-base-pretrain-lvd1689m',
        )
    )
)
