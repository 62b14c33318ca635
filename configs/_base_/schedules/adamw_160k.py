# 160,000 iterations of AdamW with stage-wise learning-rate decay in mixed
# precision, no gradient clipping; 8 GPUs x 2 images. (The published runs used
# Apex for mixed precision, level O1, in fp16; it is no longer maintained, so
# PyTorch's own takes over, in bf16 on devices that have it: no loss overflows
# and no step is skipped. Elsewhere it is fp16. dtype='float16' asks for it.)
max_iters = 160000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=16000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='convnext_mm.AmpOptimWrapper',
    constructor='convnext_mm.LayerDecayOptimWrapperConstructor',
    # fused: the same update in one pass over the weights.
    optimizer=dict(
        type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True
    ),
    paramwise_cfg=dict(decay_type='stage_wise', decay_rate=0.9, num_layers=6),
)

# Published: the warm-up factor times the linear decay, which runs from the
# first iteration on. Both schedulers below multiply the learning rate, so run
# together they give that product. Each `end` is one more than the published
# number because MMEngine reaches the end value one iteration before `end`.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0.0,
        by_epoch=False,
        begin=0,
        end=max_iters + 1,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
