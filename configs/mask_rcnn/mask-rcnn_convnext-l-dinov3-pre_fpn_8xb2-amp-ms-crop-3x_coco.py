# DINOv3 weights, distilled from ViT-7B on 1.7 billion images. They are gated:
# accept the licence on the model's page first. Our choice, for no fine-tuned
# detector with them is published: V1's Mask R-CNN recipe with lr 1e-4; drop
# path and layer decay are those of V1's Cascade Mask R-CNN of this
# size from ImageNet-22K.
_base_ = './mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='large',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-large-pretrain-lvd1689m',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.7, num_layers=12))
