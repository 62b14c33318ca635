# DINO with four scales: three maps and one that the neck adds. Layer decay
# replaces DINO's rule of a tenth of the learning rate for the whole backbone.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['convnext_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        drop_path_rate=0.2,
        layer_scale_init_value=1.0,
        out_indices=(1, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_tiny_1k_224_ema.pth',
        ),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)

optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(fused=True),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8),
)
