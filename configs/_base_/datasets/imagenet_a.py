# ImageNet-A (arXiv 1907.07174): natural adversarial examples of 200 classes, among
# which alone the prediction is taken, as its authors evaluate.
# The test pipelines are those of ImageNet-1K in the paper's code: a centre crop at 7/8
# at 224 x 224, images warped at 384 x 384 (`pipeline_384`, for recipes of that size).
_base_ = './imagenet_test.py'

data_root = 'data/imagenet-a'
data_help = (
    'ImageNet-A is at https://github.com/hendrycks/natural-adv-examples: unpack '
    'imagenet-a.tar into data/imagenet-a'
)
test_dataloader = dict(
    dataset=dict(type='convnext_mm.ImageNetFolders', classes='a', data_root=data_root)
)
test_evaluator = dict(type='convnext_mm.SubsetAccuracy', classes='a')
