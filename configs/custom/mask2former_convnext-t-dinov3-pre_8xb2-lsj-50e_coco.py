# Mask2Former for instances on DINOv3 weights. They are gated: accept
# the licence on the model's page first. Nothing is published or tuned.
_base_ = './mask2former_convnext-t_8xb2-lsj-50e_coco.py'

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-tiny-pretrain-lvd1689m',
        )
    )
)
