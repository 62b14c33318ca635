# 90 epochs of AdamW, batch 4096, cosine schedule after 5 epochs of warm-up, no
# average of weights, no validation.
_base_ = './adamw_imagenet_300e.py'

epochs = 90
warmup_epochs = 5
train_cfg = dict(max_epochs=epochs)
val_cfg = None
test_cfg = None
param_scheduler = _base_.param_scheduler
param_scheduler[0].end = warmup_epochs
param_scheduler[1].update(begin=warmup_epochs, end=epochs)
custom_hooks = []
