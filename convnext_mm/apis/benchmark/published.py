"""What the ConvNeXt paper (arXiv 2201.03545) measured of speed and memory, and of
which of it a measurement elsewhere can say anything."""

from typing import NamedTuple

SOURCE = 'arXiv 2201.03545: tables 2, 3 and 12, section 4, appendix E'
PAPER_KIND = 'paper'  # of a result file
LETTERS = dict(tiny='T', small='S', base='B', large='L', xlarge='XL')


class Figures(NamedTuple):
    """Of one row: the paper's ConvNeXt and what it stands beside; None where it
    has no such figure."""

    convnext: float
    swin: float | None = None
    resnet50: float | None = None
    convnext_22k: float | None = None  # the same network, other weights


# Table 12, images per second by arch and side of the image.
THROUGHPUT = {
    ('tiny', 224): Figures(1943.5, 1325.6),
    ('small', 224): Figures(1275.3, 857.3),
    ('base', 224): Figures(969.0, 662.8),
    ('base', 384): Figures(336.6, 242.5),
    ('large', 224): Figures(611.5, 435.9),
    ('large', 384): Figures(211.4, 157.9),
    ('xlarge', 224): Figures(424.4),
    ('xlarge', 384): Figures(147.4),
}
# Table 3, frames per second by detector and arch. Large and xlarge have weights of
# ImageNet-22K.
DETECTOR_SIZE = (800, 1280)
FPS = {
    ('Mask R-CNN', 'tiny'): Figures(25.6, 23.1),
    ('Cascade', 'tiny'): Figures(13.5, 12.2, resnet50=16.2),
    ('Cascade', 'small'): Figures(12.0, 11.4),
    ('Cascade', 'base'): Figures(11.4, 10.7, convnext_22k=11.5),
    ('Cascade', 'large'): Figures(10.0, 9.2),
    ('Cascade', 'xlarge'): Figures(8.6),
}
# Section 4, GB in a train step.
MEMORY = {('Cascade', 'base'): Figures(17.4, 18.5)}
MEMORY_BATCH = 2
# Table 2, images per second and GB in a train step, and the drop path rate trained
# with.
ISOTROPIC_SIZE = (224, 224)
ISOTROPIC_BATCH = 32
ISOTROPIC_THROUGHPUT = {
    'small': Figures(1038.7),
    'base': Figures(320.1),
    'large': Figures(94.4),
}
ISOTROPIC_MEMORY = {'small': Figures(4.2), 'base': Figures(7.7), 'large': Figures(20.4)}
ISOTROPIC_DROP_PATH = dict(small=0.1, base=0.2, large=0.5)

# By block: how the published figures came to be, and what that leaves to compare.
CONDITIONS = {
    'throughput': (
        'Published: one A100, TF32, channels-last; the batch is not '
        'stated. Images per second of another device, batch or PyTorch are not '
        'comparable with them; ratios between networks on one machine are, with care. '
        'Only fp32 rows have a published counterpart, and only where fp32 is TF32.'
    ),
    'detectors': (
        'Published: one A100, COCO images, trained weights. Here: one random image, '
        'always 1000 proposals into the box heads and 100 detections into the mask '
        'heads, and NMS on the same boxes for every network, so that random weights '
        'do not decide what an image costs; a trained detector has fewer or more. All '
        "have the recipe's heads, Swin and ResNet-50 MMDetection's settings. B with "
        'weights of ImageNet-22K is the same network and not measured twice.'
    ),
    'memory': (
        'Published: peak in GB with 2 images on each GPU; GPU, precision and whether a '
        'GB is 10^9 or 2^30 bytes are not stated. Here: the peak of what PyTorch '
        'allocates in a train step, in GiB, weights, gradients and AdamW included, '
        'in one size where multi-scale training has many.'
    ),
    'isotropic': (
        'Published: V100, which has no TF32; memory of training with 32 images on '
        'each GPU. Here the peak is what PyTorch allocates, in GiB, with AdamW and '
        'cross entropy, without a moving average of the weights.'
    ),
}
