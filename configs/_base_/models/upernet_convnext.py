# UPerNet with an auxiliary FCN head on the third map; heads and losses are
# those of MMSegmentation's UPerNet. (Spelt out, because MMEngine's `mmseg::`
# does not find MMSegmentation installed as onedl-mmsegmentation.)
custom_imports = dict(imports=['convnext_mm'])
norm_cfg = dict(type='SyncBN', requires_grad=True)
head = dict(num_classes=150, dropout_ratio=0.1, norm_cfg=norm_cfg, align_corners=False)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        size=(512, 512),
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        layer_scale_init_value=1.0,
        out_layout='channels_last',
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[96, 192, 384, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        **head,
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=384,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
        **head,
    ),
    train_cfg={},
    test_cfg=dict(mode='whole'),
)
