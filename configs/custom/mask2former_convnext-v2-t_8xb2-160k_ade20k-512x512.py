# Mask2Former for ADE20K on ConvNeXt V2, fine-tuned on ImageNet-1K (in UPerNet
# better than FCMAE weights, says arXiv 2301.00808). Nothing is published or
# tuned.
_base_ = './mask2former_convnext-t_8xb2-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        use_grn=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/im1k/convnextv2_tiny_1k_224_ema.pt',
        ),
    )
)
