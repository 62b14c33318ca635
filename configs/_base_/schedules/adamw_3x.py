# 36 epochs of AdamW with layer-wise learning-rate decay in mixed precision, no
# gradient clipping; 8 GPUs x 2 images. (The published runs used Apex for mixed
# precision, level O1, in fp16; it is no longer maintained, so PyTorch's own
# takes over, in bf16 on devices that have it: no loss overflows and no step
# is skipped. Elsewhere it is fp16. dtype='float16' asks for it.)
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=36, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='convnext_mm.AmpOptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    ),
    paramwise_cfg=dict(decay_type='layer_wise', decay_rate=0.7, num_layers=6),
)

param_scheduler = [
    # 500 iterations of warm-up: end is 501 because MMEngine reaches the full
    # learning rate one iteration before `end`, the published runs at 500.
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=501),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        begin=0,
        end=36,
        milestones=[27, 33],
        gamma=0.1,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
