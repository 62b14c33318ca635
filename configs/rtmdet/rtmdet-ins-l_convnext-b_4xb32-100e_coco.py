# RTMDet-Ins-l, instance segmentation, on ConvNeXt-B. MMDetection's, with what its
# RTMDet-l changes for ConvNeXt-B: group norm, learning rate, 100 epochs. Nothing is
# published or tuned.
_base_ = 'mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py'
custom_imports = dict(imports=['convnext_mm'])

norm_cfg = dict(type='GN', num_groups=32)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
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
    ),
    neck=dict(in_channels=[256, 512, 1024], norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)

max_epochs, last_epochs = 100, 10  # the last without mosaic and mixup
base_lr = 0.001
train_cfg = dict(
    max_epochs=max_epochs, dynamic_intervals=[(max_epochs - last_epochs, 1)]
)
optim_wrapper = dict(
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=base_lr),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8),
)
param_scheduler = _base_.param_scheduler
param_scheduler[1].update(
    eta_min=base_lr * 0.05, begin=max_epochs // 2, end=max_epochs, T_max=max_epochs // 2
)
custom_hooks = _base_.custom_hooks
custom_hooks[1].switch_epoch = max_epochs - last_epochs
