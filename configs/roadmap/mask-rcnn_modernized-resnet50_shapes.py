# Any network on the road from ResNet-50 to ConvNeXt-T, a quarter as wide, from scratch
# on drawn shapes: --cfg-options model.backbone.step='patchify stem'.
_base_ = '../demo/mask-rcnn_convnext-atto_shapes-520it.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ModernizedResNet',
        regime='resnet50',
        step='separate downsampling',
        width_multiplier=0.25,
        layer_scale_init_value=0,  # as all other steps
        # As the demo: with few channels and iterations it learns faster than from the
        # published std of 0.02.
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            mode='fan_in',
            nonlinearity='linear',
        ),
    ),
    neck=dict(in_channels=[24, 48, 96, 192]),
)
