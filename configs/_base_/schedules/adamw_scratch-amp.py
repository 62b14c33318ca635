# A few hundred iterations of AdamW from scratch in mixed precision, for runs of
# a minute or two on a GPU.
max_iters = 300
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# From scratch there is nothing to preserve, so no layer decay: rate 1.
optim_wrapper = dict(
    type='convnext_mm.AmpOptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW',
        lr=4e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        fused=True),
    paramwise_cfg=dict(decay_rate=1.0),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR',
        by_epoch=False,
        begin=30,
        end=max_iters,
        eta_min=4e-6)
]
randomness = dict(seed=0)
