# Mask R-CNN on your own data in COCO format. Copy this file and change what is
# marked; it assumes
#   data/own/train/*.jpg  data/own/train.json  (images, annotations, categories)
#   data/own/val/*.jpg    data/own/val.json
# and starts with: python tools/train.py configs/custom/YOUR_COPY.py
# Boxes without masks: begin with faster-rcnn_convnext-t_fpn_1x_coco.py instead.
_base_ = '../mask_rcnn/mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py'

# CHANGE: where the data is; ends with a slash.
data_root = 'data/own/'
# CHANGE: the names in the annotation files' categories, in the same order. One
# class is ('name', ) with a comma.
classes = ('circle', 'triangle', 'square', 'star', 'cross')
# CHANGE: for one GPU and its batch of 2; the published 1e-4 is for 16 images.
learning_rate = 1e-4 / 8
max_epochs = 12

num_classes = len(classes)
model = dict(
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes), mask_head=dict(num_classes=num_classes)
    )
)

train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='val.json',
        data_prefix=dict(img='val/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=learning_rate))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR',
        by_epoch=True,
        milestones=[max_epochs * 2 // 3, max_epochs * 11 // 12],
        gamma=0.1,
    ),
]
# Keeps the checkpoint with the best mask AP on the validation images.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='coco/segm_mAP'))
