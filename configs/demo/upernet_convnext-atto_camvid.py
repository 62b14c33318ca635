# The same small UPerNet on real street images, at reduced size for a CPU. 60
# iterations show that all parts work; they do not make a good segmentor.
_base_ = [
    '../_base_/models/upernet_convnext-atto_narrow.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/adamw_cpu-60it.py',
    '../_base_/seg_runtime.py',
]

# The label that CamVid leaves out, also where a crop is padded.
ignored = dict(num_classes=11, ignore_index={{_base_.ignore_index}})
model = dict(
    data_preprocessor=dict(
        size={{_base_.crop_size}}, seg_pad_val={{_base_.ignore_index}}
    ),
    decode_head=ignored,
    auxiliary_head=ignored,
)

default_hooks = dict(
    logger=dict(interval=5), checkpoint=dict(interval=30, max_keep_ckpts=1)
)
