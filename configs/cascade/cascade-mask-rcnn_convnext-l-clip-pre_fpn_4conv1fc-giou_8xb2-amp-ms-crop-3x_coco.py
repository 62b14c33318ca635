# CLIP image tower, trained on LAION-2B. Our choice, for no recipe is published:
# the one of the same size from ImageNet-22K, in mixed precision.
_base_ = './cascade-mask-rcnn_convnext-t_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    # CLIP's normalisation of images, not ImageNet's.
    data_preprocessor=dict(
        mean=[122.771, 116.746, 104.094], std=[68.500, 66.632, 70.323]
    ),
    backbone=dict(
        arch='large',
        drop_path_rate=0.7,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='timm://convnext_large_mlp.clip_laion2b_augreg',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.7, num_layers=12)
)
