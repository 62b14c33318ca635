# MMPretrain's classifier. The backbone emits pooled, normalised vectors, so the
# head is one linear layer. (The type is scoped: under MMPretrain's scope the
# bare name is MMPretrain's own backbone.)
custom_imports = dict(imports=['convnext_mm'])
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='convnext_mm.ConvNeXt',
        arch='tiny',
        layer_scale_init_value=1e-6,
        out_indices=3,
        gap_before_final_norm=True,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
    ),
    # One of the two for each batch, with equal chance.
    train_cfg=dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    ),
)
