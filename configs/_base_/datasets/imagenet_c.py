# ImageNet-C (arXiv 1903.12261): 15 corruptions of the validation set, 5 severities.
# Its images are centre crops of 224 x 224 already. At that size they are taken as they
# are, as the authors of ImageNet-C evaluate; at 384 x 384 they are warped, as the
# ConvNeXt paper's code does with every test image of that size. The paper says neither,
# and the code of its table is not released.
_base_ = './imagenet_test.py'

data_root = 'data/imagenet-c'
data_help = (
    'ImageNet-C is at https://zenodo.org/records/2235448: unpack blur, digital, noise '
    'and weather.tar into data/imagenet-c, the folders of corruptions side by side'
)
pack = dict(
    type='PackInputs', meta_keys=('sample_idx', 'img_path', 'corruption', 'severity')
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='CenterCrop', crop_size=224),
    pack,
]
pipeline_384 = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(384, 384), backend='pillow', interpolation='bicubic'),
    pack,
]
test_dataloader = dict(
    dataset=dict(
        type='convnext_mm.ImageNetCorrupted',
        data_root=data_root,
        pipeline=test_pipeline,
    )
)
test_evaluator = dict(type='convnext_mm.CorruptionError')
