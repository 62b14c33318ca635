# ConvNeXt V2, fine-tuned on ImageNet-1K (better here than FCMAE weights, says
# the paper). Published (arXiv 2301.00808, appendix A.4): 160,000 iterations of
# batch 16 at 512 x 512, AdamW, weight decay 0.05, five test scales, and the
# sets swept: layer-wise decay 0.8, 0.9, lr 1e-4 to 3e-4, drop path 0.1 to 0.4.
# Our choice: from these sets 0.9, 1e-4 and a drop path that grows with the
# network; for what the paper does not say (schedule, mixed precision, sliding
# window at one scale) the recipes of V1. It mentions no flips, so --tta makes
# none.
_base_ = './convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        use_grn=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/im1k/convnextv2_tiny_1k_224_ema.pt',
        ),
    )
)

optim_wrapper = dict(paramwise_cfg=dict(decay_type='layer_wise'))

tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=scale, keep_ratio=True)
                for scale in (
                    (1536, 384),
                    (1792, 448),
                    (2048, 512),
                    (2304, 576),
                    (2560, 640),
                )
            ],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
