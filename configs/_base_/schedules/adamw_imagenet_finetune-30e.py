# 30 epochs of fine-tuning, batch 512: AdamW with layer-wise learning-rate decay
# and next to no weight decay, cosine schedule to 1e-6 (scaled for each layer
# like the rest) without warm-up, in full precision. Source: the released
# commands.
train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = {}
test_cfg = {}

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW', lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-8, fused=True
    ),
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.8, num_layers=12),
)
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 5e-5,
        by_epoch=True,
        begin=0,
        end=30,
        convert_to_iter_based=True,
    )
]
auto_scale_lr = dict(enable=False, base_batch_size=512)
