# Linear probing of FCMAE weights for classification.
_base_ = './convnext-tiny-dinov3-pre_8xb32-linear-coslr-100e_in1k.py'

model = dict(
    backbone=dict(
        use_grn=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_tiny_1k_224_fcmae.pt',
        ),
    )
)
