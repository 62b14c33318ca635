# CLIP image tower, trained on LAION-2B. Our choice, for no recipe is published:
# the one of the same size from ImageNet-22K, in mixed precision.
_base_ = './cascade-mask-rcnn_convnext-t_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    # CLIP's normalisation of images, not ImageNet's.
    data_preprocessor=dict(
        mean=[122.771, 116.746, 104.094], std=[68.500, 66.632, 70.323]
    ),
    backbone=dict(
        arch='base',
        drop_path_rate=0.6,
        init_cfg=dict(
            type='Pretrained', checkpoint='timm://convnext_base.clip_laion2b_augreg'
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.8, num_layers=12)
)
