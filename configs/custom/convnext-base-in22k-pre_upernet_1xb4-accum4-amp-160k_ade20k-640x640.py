# The published recipe on one GPU: 4 batches of 4 images for a step, so that the
# learning rate stays. Written with 24 GB in mind; no GPU has measured its memory.
# with_cp keeps the input of each block alone, lean+ little of the one that backward
# is at: see docs/recipes.md. What differs: batch norm sees 4 images, not 16.
_base_ = '../upernet/convnext-base-in22k-pre_upernet_8xb2-amp-160k_ade20k-640x640.py'

accumulated = 4
model = dict(backbone=dict(with_cp=True, impl='lean+'))

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(accumulative_counts=accumulated)
# Loops, schedulers and hooks count batches, not steps.
max_iters = 160000 * accumulated
train_cfg = dict(max_iters=max_iters, val_interval=16000 * accumulated)
default_hooks = dict(checkpoint=dict(interval=16000 * accumulated))
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = 1500 * accumulated + 1
param_scheduler[1].end = max_iters + 1
