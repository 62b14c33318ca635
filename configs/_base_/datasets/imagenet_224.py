# ImageNet-1K at 224 x 224: RandAugment 9, 0.5 and random erasing 0.25 for
# training, a centre crop at 7/8 for testing.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

data_root = 'data/imagenet'
# Epochs are whole batches only, as in the published code.
train_dataloader = dict(batch_size=128, drop_last=True)
