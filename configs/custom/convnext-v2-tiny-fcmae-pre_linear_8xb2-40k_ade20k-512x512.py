# Linear probing of FCMAE weights for semantic segmentation.
_base_ = './convnext-tiny-dinov3-pre_linear_8xb2-40k_ade20k-512x512.py'

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
