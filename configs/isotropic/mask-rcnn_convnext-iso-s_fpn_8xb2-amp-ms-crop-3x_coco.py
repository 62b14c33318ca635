# Isotropic ConvNeXt, a simple pyramid and the FPN. Nothing is published for it in
# dense tasks: settings are those of ConvNeXt-T, drop path that of its pretraining.
_base_ = '../mask_rcnn/mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.IsotropicConvNeXt',
        arch='small',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_iso_small_1k_224_ema.pth',
        ),
    ),
    neck=[
        dict(type='convnext_mm.SimplePyramid', in_channels=384),
        dict(type='FPN', in_channels=[96, 192, 384, 384], out_channels=256, num_outs=5),
    ],
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=None))  # one for each block
