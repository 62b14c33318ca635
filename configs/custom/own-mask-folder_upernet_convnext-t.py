# UPerNet on your own images and class maps. Copy this file and change what is
# marked; it assumes
#   data/own/images/{train,val}/*.jpg
#   data/own/annotations/{train,val}/*.png  (same names)
# where an annotation has one channel whose pixels are class numbers: 0 is the
# first name in `classes`, 1 the second, 255 is ignored. (Object masks of 0 and
# 255 therefore have to become 0 and 1.) It starts with:
# python tools/train.py configs/custom/YOUR_COPY.py
_base_ = [
    '../_base_/models/upernet_convnext.py',
    '../_base_/schedules/adamw_160k.py',
    '../_base_/seg_runtime.py',
]

# CHANGE: where the data is; ends with a slash.
data_root = 'data/own/'
# CHANGE: the name of class 0, class 1, ...; include the background if it has a
# number of its own.
classes = ('background', 'circle', 'triangle', 'square', 'star', 'cross')
# CHANGE: the endings of the file names.
img_suffix, seg_map_suffix = '.jpg', '.png'
# CHANGE: training crops, and the scale (longest, shortest side) of an image.
crop_size = (512, 512)
scale = (2048, 512)
# CHANGE: for one GPU with this batch; the published 1e-4 is for 16 images.
batch_size = 4
learning_rate = 1e-4 / 4
max_iters = 20000

num_classes = len(classes)
# BN: on one GPU. For several put SyncBN here.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.4,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnext_tiny_1k_224_ema.pth',
        ),
    ),
    decode_head=dict(num_classes=num_classes, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=num_classes, norm_cfg=norm_cfg),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix=img_suffix,
    seg_map_suffix=seg_map_suffix,
)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
optim_wrapper = dict(optimizer=dict(lr=learning_rate))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=500, end=max_iters),
]
# Keeps the checkpoint with the best mIoU on the validation images.
default_hooks = dict(
    checkpoint=dict(interval=max_iters // 10, max_keep_ckpts=1, save_best='mIoU')
)
