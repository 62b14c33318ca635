# UPerNet tiny from scratch on CamVid at the size of its images, for a GPU.
_base_ = [
    '../_base_/models/upernet_convnext.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_scratch-amp.py',
    '../_base_/seg_runtime.py',
]

crop_size = (352, 480)
# The label that CamVid leaves out, also where a crop is padded.
ignored = dict(num_classes=11, ignore_index={{_base_.ignore_index}})
model = dict(
    data_preprocessor=dict(size=crop_size, seg_pad_val={{_base_.ignore_index}}),
    decode_head=ignored,
    auxiliary_head=ignored,
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize', scale=(480, 360), ratio_range=(1.0, 1.5), keep_ratio=True
    ),
    dict(type='RandomCrop', crop_size=crop_size, ignore_index={{_base_.ignore_index}}),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=16, num_workers=6, dataset=dict(pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=2, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
