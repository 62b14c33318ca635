_base_ = './convnext-tiny_32xb128_in1k.py'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.5), head=dict(in_channels=1536)
)

train_dataloader = dict(batch_size=64)
