# A few hundred iterations of AdamW from scratch in mixed precision, for runs of
# a minute or two on a GPU.
_base_ = './adamw_scratch.py'

max_iters = 300
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(type='convnext_mm.AmpOptimWrapper', optimizer=dict(lr=4e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', by_epoch=False, begin=30, end=max_iters, eta_min=4e-6
    ),
]
