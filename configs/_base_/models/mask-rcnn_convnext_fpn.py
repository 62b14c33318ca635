# Mask R-CNN with FPN. Heads, RPN, proposals and test settings are those of
# MMDetection's Mask R-CNN; only the backbone and what it hands over change.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
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
    # Takes maps in any layout and dtype, which mmcv's RoIAlign does not.
    roi_head=dict(
        bbox_roi_extractor=dict(type='convnext_mm.SingleRoIExtractor'),
        mask_roi_extractor=dict(type='convnext_mm.SingleRoIExtractor'),
    ),
)
