# ImageNet-R (arXiv 2006.16241): renditions of 200 classes, among which alone the
# prediction is taken, as its authors evaluate.
# The test pipelines are those of ImageNet-1K in the paper's code: a centre crop at 7/8
# at 224 x 224, images warped at 384 x 384 (`pipeline_384`, for recipes of that size).
_base_ = './imagenet_test.py'

data_root = 'data/imagenet-r'
data_help = (
    'ImageNet-R is at https://github.com/hendrycks/imagenet-r: unpack '
    'imagenet-r.tar into data/imagenet-r'
)
test_dataloader = dict(
    dataset=dict(type='convnext_mm.ImageNetFolders', classes='r', data_root=data_root)
)
test_evaluator = dict(type='convnext_mm.SubsetAccuracy', classes='r')
