# ConvNeXt V2 from FCMAE weights. Published (arXiv 2301.00808, appendix A.3):
# Mask R-CNN, 36 epochs, batch 32, AdamW, lr 1e-4, weight decay 0.05,
# large-scale jittering at 1024 x 1024, soft-NMS, and the sets swept: layer
# decay 0.9, 0.95, drop path 0.2 to 0.5. Our choice: from these sets 0.95 (as
# MMDetection's ConvNeXt V2 project) and a drop path that grows with the
# network; for what the paper does not say (warm-up, milestones, mixed
# precision) the recipes of V1. No result is published for tiny.
_base_ = [
    '../_base_/models/mask-rcnn_convnext_fpn.py',
    '../_base_/datasets/coco_instance_lsj.py',
    '../_base_/schedules/adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(
        batch_augments=[
            dict(type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True)
        ]
    ),
    backbone=dict(
        arch='tiny',
        use_grn=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_tiny_1k_224_fcmae.pt',
        ),
    ),
    test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))),
)

train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.95, num_layers=6)
)
auto_scale_lr = dict(base_batch_size=32)
