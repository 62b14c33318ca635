_base_ = './convnext-tiny_32xb128_in1k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.4))
