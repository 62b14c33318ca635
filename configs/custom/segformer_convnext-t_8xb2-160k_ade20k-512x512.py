# SegFormer's all-MLP head. It trains with ten times the learning rate, as in
# SegFormer.
_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
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
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)

optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(fused=True),
    paramwise_cfg=dict(
        _delete_=True, decay_rate=0.9, custom_keys=dict(decode_head=dict(lr_mult=10.0))
    ),
)
