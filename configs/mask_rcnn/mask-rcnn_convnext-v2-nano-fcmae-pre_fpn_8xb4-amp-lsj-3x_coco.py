# Settings: see tiny. Drop path 0.1 is our choice,
# smaller than the swept ones, for a small network.
_base_ = './mask-rcnn_convnext-v2-t-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco.py'

model = dict(
    backbone=dict(
        arch='nano',
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_nano_1k_224_fcmae.pt',
        ),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
