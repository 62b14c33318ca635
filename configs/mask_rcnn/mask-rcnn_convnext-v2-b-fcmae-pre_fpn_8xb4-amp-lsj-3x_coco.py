# Settings: see tiny. Drop path 0.4 is our choice,
# from the published set; MMDetection's ConvNeXt V2 project used it.
_base_ = './mask-rcnn_convnext-v2-t-fcmae-pre_fpn_8xb4-amp-lsj-3x_coco.py'

model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_base_1k_224_fcmae.pt',
        ),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
