_base_ = './convnext-tiny_128xb32_in22k.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.0))
