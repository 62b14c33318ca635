# ImageNet-C-bar (arXiv 2102.11273): 10 corruptions unlike those of ImageNet-C.
# Its images are centre crops of 224 x 224 already. At that size they are taken as they
# are, as the authors of ImageNet-C evaluate; at 384 x 384 they are warped, as the
# ConvNeXt paper's code does with every test image of that size. The paper says neither,
# and the code of its table is not released.
_base_ = './imagenet_test.py'

data_root = 'data/imagenet-c-bar'
data_help = (
    'ImageNet-C-bar is at https://github.com/facebookresearch/augmentation-corruption: '
    'unpack imagenet_c_bar.tar.gz into data/imagenet-c-bar'
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
        corruptions='c-bar',
        data_root=data_root,
        pipeline=test_pipeline,
    )
)
test_evaluator = dict(type='convnext_mm.CorruptionError')
