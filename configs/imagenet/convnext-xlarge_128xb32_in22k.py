_base_ = './convnext-tiny_128xb32_in22k.py'

model = dict(
    backbone=dict(arch='xlarge', drop_path_rate=0.2), head=dict(in_channels=2048)
)
