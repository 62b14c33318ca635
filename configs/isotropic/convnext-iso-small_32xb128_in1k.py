# Table 5 of arXiv 2201.03545 with 50 epochs of warm-up, its appendix A.1.
_base_ = '../imagenet/convnext-small_32xb128_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.IsotropicConvNeXt',
        arch='small',
        drop_path_rate=0.1,
        gap_before_final_norm=True,
    ),
    head=dict(in_channels=384),
)

warmup_epochs = 50
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-9,
        by_epoch=True,
        begin=0,
        end=warmup_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-6 / 4e-3,
        by_epoch=True,
        begin=warmup_epochs,
        end=300,
        convert_to_iter_based=True,
    ),
]
