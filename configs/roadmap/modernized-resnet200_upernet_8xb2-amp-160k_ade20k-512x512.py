# Any network on the road from ResNet-200 to ConvNeXt-B: --cfg-options
# model.backbone.step='patchify stem' (the steps: convnext-mm show roadmap). What reads
# the backbone's maps follows it.
# It starts from what modernized-resnet200_32xb128_in1k.py trained for the same step.
_base_ = '../upernet/convnext-base_upernet_8xb2-amp-160k_ade20k-512x512.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='convnext_mm.ModernizedResNet',
        regime='resnet200',
        step='separate downsampling',
        drop_path_rate=0.4,
        norm_eval=True,  # of the two images of a GPU BatchNorm learns little
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/modernized-resnet200_32xb128_in1k/epoch_300.pth',
        ),
    )
)

optim_wrapper = dict(paramwise_cfg=dict(num_layers=None))  # the first steps are deeper
