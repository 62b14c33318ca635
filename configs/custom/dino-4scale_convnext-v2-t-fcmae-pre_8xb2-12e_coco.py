# DINO on ConvNeXt V2 from FCMAE weights. Nothing is published or
# tuned.
_base_ = './dino-4scale_convnext-t_8xb2-12e_coco.py'

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
