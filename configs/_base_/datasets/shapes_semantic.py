# The bundled shapes data set, ADE20K layout: `python -m convnext_mm.datasets
# data/shapes` draws it. Background is a class.
data_root = 'data/shapes/'
data_help = 'Draw it with: python -m convnext_mm.datasets data/shapes'
metainfo = dict(
    classes=('background', 'circle', 'triangle', 'square', 'star', 'cross'),
    palette=[
        [0, 0, 0],
        [230, 60, 60],
        [60, 180, 75],
        [0, 110, 220],
        [255, 200, 0],
        [200, 60, 220],
    ],
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomFlip',
        prob=[0.3, 0.3, 0.2],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(
            img_path='images/training/', seg_map_path='annotations/training/'
        ),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo=metainfo,
        img_suffix='.png',
        data_prefix=dict(
            img_path='images/validation/', seg_map_path='annotations/validation/'
        ),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
