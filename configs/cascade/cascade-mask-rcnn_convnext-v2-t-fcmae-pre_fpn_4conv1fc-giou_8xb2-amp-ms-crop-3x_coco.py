# ConvNeXt V2 from FCMAE weights. Our choice, for no Cascade recipe of V2 is
# published: the Cascade recipe of V1, so that the two compare, with lr 1e-4 and
# a layer decay and drop path out of what V2's Mask R-CNN was tuned over
# (arXiv 2301.00808, appendix A.3: 0.9 or 0.95, 0.2 to 0.5).
_base_ = './cascade-mask-rcnn_convnext-t_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco.py'

model = dict(
    backbone=dict(
        arch='tiny',
        use_grn=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/'
            'convnextv2/pt_only/convnextv2_tiny_1k_224_fcmae.pt',
        ),
    )
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4), paramwise_cfg=dict(decay_rate=0.9, num_layers=6)
)
