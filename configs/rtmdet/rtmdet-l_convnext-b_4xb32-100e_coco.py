# RTMDet-l on ConvNeXt-B, as MMDetection trained and released it. Its heads and
# settings are MMDetection's; the backbone is this package's.
_base_ = 'mmdet::rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py'
custom_imports = dict(imports=['convnext_mm'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ConvNeXt',
        arch='base',
        out_indices=(1, 2, 3),
        drop_path_rate=0.7,
        layer_scale_init_value=1.0,
        with_cp=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_base_22k_1k_384.pth',
        ),
    )
)
optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8, num_layers=12),
)
