# ImageNet-Sketch (arXiv 1905.13549): drawings of all 1000 classes.
# The test pipelines are those of ImageNet-1K in the paper's code: a centre crop at 7/8
# at 224 x 224, images warped at 384 x 384 (`pipeline_384`, for recipes of that size).
_base_ = './imagenet_test.py'

data_root = 'data/imagenet-sketch'
data_help = (
    'ImageNet-Sketch is at https://github.com/HaohanWang/ImageNet-Sketch: unpack its '
    'folders of classes into data/imagenet-sketch'
)
test_dataloader = dict(
    dataset=dict(type='convnext_mm.ImageNetFolders', data_root=data_root)
)
test_evaluator = dict(type='Accuracy', topk=(1,))
