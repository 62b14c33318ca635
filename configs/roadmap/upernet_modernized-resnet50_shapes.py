# Any network on the road from ResNet-50 to ConvNeXt-T, a quarter as wide, from scratch
# on drawn shapes: what tools/maintenance/run_roadmap.py trains, step after step.
_base_ = '../demo/upernet_convnext-atto_shapes.py'

data_root = 'data/shapes-96/'
data_help = 'Draw it with: python -m convnext_mm.datasets data/shapes-96 --size 96'
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ModernizedResNet',
        regime='resnet50',
        step='separate downsampling',
        width_multiplier=0.25,
        layer_scale_init_value=0,  # as all other steps
        # As the demo: with few channels and iterations it learns faster than from the
        # published std of 0.02.
        init_cfg=dict(
            type='Kaiming',
            layer=['Conv2d', 'Linear'],
            mode='fan_in',
            nonlinearity='linear',
        ),
    ),
    # Five of six pixels are background: with equal weights the first half of so short
    # a training finds nothing else.
    decode_head=dict(
        in_channels=[24, 48, 96, 192],
        channels=48,
        loss_decode=dict(class_weight=[0.1, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ),
    auxiliary_head=dict(
        in_channels=96,
        channels=48,
        loss_decode=dict(class_weight=[0.1, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ),
)

dataset = dict(data_root=data_root)
train_dataloader = dict(batch_size=8, dataset=dataset)
val_dataloader = dict(batch_size=8, dataset=dataset)
test_dataloader = val_dataloader
max_iters = 250
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=50, end=max_iters, eta_min=1e-5
    ),
]
default_hooks = dict(checkpoint=dict(interval=max_iters))
