# Mask R-CNN on a simple pyramid, as in ViTDet (arXiv 2203.16527): all levels come
# from the last map alone, here of stride 16, without a top-down path. Nothing is
# published for ConvNeXt: all other settings are those of V2's Mask R-CNN.
_base_ = '../mask_rcnn/mask-rcnn_convnext-v2-t-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco.py'

model = dict(
    backbone=dict(output_stride=16, out_indices=(3,)),
    neck=[
        dict(type='convnext_mm.SimplePyramid', in_channels=768),
        dict(
            type='ChannelMapper',
            in_channels=[192, 384, 768, 768],
            out_channels=256,
            kernel_size=3,
            norm_cfg=dict(type='GN', num_groups=32),
            act_cfg=None,
            num_outs=5,
        ),
    ],
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=None))  # as many as arch has
