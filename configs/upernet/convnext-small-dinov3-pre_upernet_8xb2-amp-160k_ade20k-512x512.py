# DINOv3 weights, distilled from ViT-7B on 1.7 billion images. They are gated:
# accept the licence on the model's page first. Our choice, for no fine-tuned
# UPerNet with them is published: V1's recipe for this size, with nothing tuned.
_base_ = './convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        arch='small',
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='hf://facebook/dinov3-convnext-small-pretrain-lvd1689m',
        ),
    )
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
