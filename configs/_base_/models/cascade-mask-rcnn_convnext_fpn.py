# Cascade Mask R-CNN with FPN. RPN, proposals, mask head and test settings are
# those of MMDetection's Cascade Mask R-CNN. Its three box heads are replaced by
# four convolutions with SyncBN and one linear layer, a box regression for each
# class, and GIoU on decoded boxes.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['convnext_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        layer_scale_init_value=1.0,
        out_layout='channels_last',
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(
        # Take maps in any layout and dtype, which mmcv's RoIAlign does not.
        bbox_roi_extractor=dict(type='convnext_mm.SingleRoIExtractor'),
        mask_roi_extractor=dict(type='convnext_mm.SingleRoIExtractor'),
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                num_classes=80,
                norm_cfg=dict(type='SyncBN', requires_grad=True),
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[centre, centre, size, size],
                ),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                loss_cls=dict(
                    type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0
                ),
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for centre, size in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ],
    ),
)
