_base_ = './convnext-tiny_128xb32_in22k.py'

model = dict(
    backbone=dict(arch='large', drop_path_rate=0.1), head=dict(in_channels=1536)
)
