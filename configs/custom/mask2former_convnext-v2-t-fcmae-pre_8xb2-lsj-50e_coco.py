# Mask2Former for instances on ConvNeXt V2 from FCMAE weights. Nothing is published or
# tuned.
_base_ = './mask2former_convnext-t_8xb2-lsj-50e_coco.py'

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
