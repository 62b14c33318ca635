# 300 epochs of AdamW, batch 4096, cosine schedule after 20 epochs of warm-up,
# in full precision, no gradient clipping. Sources: arXiv 2201.03545, table 5,
# and the released training code (warm-up from 0, cosine to 1e-6).
epochs = 300
warmup_epochs = 20
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=1)
val_cfg = {}
test_cfg = {}

optim_wrapper = dict(
    type='OptimWrapper',
    # Rate 1 is no layer decay: this constructor for its rules of weight decay.
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW', lr=4e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    ),
    paramwise_cfg=dict(decay_rate=1.0),
)
param_scheduler = [
    # MMEngine cannot start at the published 0; 1e-9 is as good.
    dict(
        type='LinearLR',
        start_factor=1e-9,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 4e-3,
        by_epoch=True,
        begin=warmup_epochs,
        end=epochs,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=4096)
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
