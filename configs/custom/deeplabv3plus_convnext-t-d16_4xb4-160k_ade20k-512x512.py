# DeepLabV3+ on maps no coarser than 1/16. For 1/8 set output_stride=8 and the
# head's dilations to (1, 12, 24, 36): finer, and more work.
# Its heads use three of the maps; in_index counts the emitted ones.
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py'
custom_imports = dict(imports=['convnext_mm'])

model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        drop_path_rate=0.2,
        layer_scale_init_value=1.0,
        output_stride=16,
        out_indices=(0, 2, 3),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_tiny_1k_224_ema.pth',
        ),
    ),
    decode_head=dict(
        in_channels=768, in_index=2, c1_in_channels=96, dilations=(1, 6, 12, 18)
    ),
    auxiliary_head=dict(in_channels=384, in_index=1),
)

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(decay_rate=0.9),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=1500, end=160000),
]
