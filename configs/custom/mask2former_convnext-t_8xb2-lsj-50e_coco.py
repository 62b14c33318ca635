# Mask2Former for instance segmentation.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
custom_imports = dict(imports=['convnext_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        drop_path_rate=0.2,
        layer_scale_init_value=1.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_tiny_1k_224_ema.pth',
        ),
    ),
    panoptic_head=dict(in_channels=[96, 192, 384, 768]),
)

# Mask2Former's own rule for its queries; layer decay for the backbone.
embed_multi = dict(lr_mult=1.0, decay_mult=0.0)
optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(fused=True),
    paramwise_cfg=dict(
        _delete_=True,
        decay_rate=0.8,
        custom_keys=dict(
            query_embed=embed_multi, query_feat=embed_multi, level_embed=embed_multi
        ),
    ),
)
