# RTMDet-l on ConvNeXt V2 from FCMAE weights. Nothing is published or tuned: all
# other settings are MMDetection's for ConvNeXt-B.
_base_ = './rtmdet-l_convnext-b_4xb32-100e_coco.py'

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
