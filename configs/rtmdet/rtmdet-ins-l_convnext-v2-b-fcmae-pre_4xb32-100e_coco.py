# RTMDet-Ins-l on ConvNeXt V2 from FCMAE weights. Nothing is published or tuned.
_base_ = './rtmdet-ins-l_convnext-b_4xb32-100e_coco.py'

model = dict(
    backbone=dict(
        use_grn=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_base_1k_224_fcmae.pt',
        ),
    )
)
