# Settings: see tiny. Drop path 0.5 is our choice,
# from the published set, the largest.
_base_ = './mask-rcnn_convnext-v2-t-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco.py'

model = dict(
    backbone=dict(
        arch='huge',
        drop_path_rate=0.5,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_huge_1k_224_fcmae.pt',
        ),
    ),
    neck=dict(in_channels=[352, 704, 1408, 2816]),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
