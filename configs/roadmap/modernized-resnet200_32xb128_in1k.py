# Any network on the road from ResNet-200 to ConvNeXt-B: --cfg-options
# model.backbone.step='patchify stem' (the steps: convnext-mm show roadmap). What reads
# the backbone's maps follows it.
# Table 5 of arXiv 2201.03545, as for ConvNeXt, without the average of weights (EMA):
# it hurts networks with BatchNorm, says appendix A.1.
_base_ = '../imagenet/convnext-base_32xb128_in1k.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ModernizedResNet',
        regime='resnet200',
        step='separate downsampling',
        drop_path_rate=0.5,
        out_indices=3,
        gap_before_final_norm=True,
    )
)
custom_hooks = []
