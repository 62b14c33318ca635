# AdamW from scratch for 1000 iterations.
max_iters = 1000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# From scratch there is nothing to preserve, so no layer decay: rate 1.
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    ),
    paramwise_cfg=dict(decay_rate=1.0),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=1e-5
    ),
]
randomness = dict(seed=0)
