# Mask R-CNN for a CPU: the smallest ConvNeXt, narrow heads with group norm
# (training from scratch wants it), few proposals.
_base_ = './mask-rcnn_convnext_fpn.py'

width = 64
norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(
        arch='atto',
        # The published initialisation (std 0.02) is for wide networks and long
        # schedules; with few channels and iterations this one learns faster.
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            mode='fan_in',
            nonlinearity='linear',
        ),
    ),
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=width, norm_cfg=norm_cfg),
    rpn_head=dict(
        in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4])
    ),
    roi_head=dict(
        # Small images: boxes of 24 to 48 pixels already use the second level.
        bbox_roi_extractor=dict(out_channels=width, finest_scale=24),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=80),
        mask_roi_extractor=dict(out_channels=width, finest_scale=24),
        mask_head=dict(
            num_convs=2,
            in_channels=width,
            conv_out_channels=width,
            norm_cfg=norm_cfg,
            num_classes=80,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
