# A box detector for a hundred or a few hundred pictures of your own, small enough to
# train from scratch on a CPU. Copy this file, change what is marked, and leave the
# copy in this folder. It assumes what `convnext-mm convert-data` writes:
#   data/own/train/*.jpg  data/own/train.json  (COCO format; masks are not needed)
#   data/own/val/*.jpg    data/own/val.json
# and starts with: convnext-mm train configs/custom/YOUR_COPY.py
# What to expect after which time: docs/own_data.md.
_base_ = './atss_convnext-t_fpn_1x_coco.py'

# CHANGE: where the data is; ends with a slash.
data_root = 'data/own/'
# CHANGE: the names in the annotation files' categories, in the same order. One
# class is ('name', ) with a comma.
classes = ('circle', 'triangle', 'square', 'star', 'cross')
# CHANGE: more epochs learn more, in as much more time.
max_epochs = 48

# Below data_root; '' for annotations of `convnext-mm convert-data --in-place`.
train_images, val_images = 'train/', 'val/'
# Longest side of a picture in pixels: a smaller one is faster, and loses small
# objects. On a GPU take 640 or more.
size = 256
batch_size = 4
# For this batch. From a checkpoint: 2e-4, which changes what it knows more slowly.
learning_rate = 1e-3
# From a checkpoint of the same arch instead:
# dict(_delete_=True, type='Pretrained', checkpoint='FILE or address')
init_cfg = dict(
    _delete_=True,
    type='Kaiming',
    layer=['Conv2d', 'Linear'],
    mode='fan_in',
    nonlinearity='linear',
)

width = 64
# Statistics of a batch of four are too few for batch norm.
norm_cfg = dict(type='GN', num_groups=16, requires_grad=True)
model = dict(
    backbone=dict(arch='atto', drop_path_rate=0.0, init_cfg=init_cfg),
    neck=dict(
        in_channels=[80, 160, 320], out_channels=width, num_outs=4, norm_cfg=norm_cfg
    ),
    bbox_head=dict(
        num_classes=len(classes),
        in_channels=width,
        feat_channels=width,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(octave_base_scale=5, strides=[8, 16, 32, 64]),
    ),
    test_cfg=dict(score_thr=0.02),
)

resize = dict(type='Resize', scale=(size, size), keep_ratio=True)
load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    resize,
]
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='train.json',
        data_prefix=dict(img=train_images),
        # Pictures without objects are examples, too.
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=[*load, dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')],
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        ann_file='val.json',
        data_prefix=dict(img=val_images),
        pipeline=[*load, _base_.test_pipeline[-1]],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs, val_interval=max(1, max_epochs // 6))
optim_wrapper = dict(
    optimizer=dict(lr=learning_rate),
    paramwise_cfg=dict(decay_rate=1.0),  # from a checkpoint 0.95
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        T_max=max_epochs,
        end=max_epochs,
        eta_min_ratio=0.01,
        convert_to_iter_based=True,
    ),
]
randomness = dict(seed=0)
# Keeps the newest checkpoint, and that with the best AP on the validation images.
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'),
)
