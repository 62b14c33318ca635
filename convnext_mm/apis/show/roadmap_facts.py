"""What arXiv 2201.03545 published of its road from ResNet to ConvNeXt."""

from typing import NamedTuple

SOURCE = 'arXiv 2201.03545: tables 1, 10 and 11, figure 2'


class Published(NamedTuple):
    """ImageNet-1K at 224 x 224, 300 epochs but for the first step.

    Attributes:
        top1: Percent.
        gflops: Multiply-accumulates, as printed.
        std: Of top1 over three seeds; None where none is given.
    """

    top1: float
    gflops: float
    std: float | None = None


class Peer(NamedTuple):
    """The Swin Transformer that a regime ends beside."""

    name: str
    top1: float
    gflops: float


# Tables 10 and 11.
PUBLISHED: dict[str, dict[str, Published]] = {
    'resnet50': {
        'resnet': Published(76.13, 4.09),
        'enhanced recipe': Published(78.82, 4.09, 0.07),
        'stage ratio': Published(79.36, 4.53, 0.07),
        'patchify stem': Published(79.51, 4.42, 0.18),
        'depthwise conv': Published(78.28, 2.35, 0.08),
        'increase width': Published(80.5, 5.27, 0.02),
        'inverting dimensions': Published(80.64, 4.64, 0.03),
        'move up depthwise conv': Published(79.92, 4.07, 0.08),
        'kernel size 5': Published(80.35, 4.1, 0.08),
        'kernel size 7': Published(80.57, 4.15, 0.14),
        'kernel size 9': Published(80.57, 4.21, 0.06),
        'kernel size 11': Published(80.47, 4.29, 0.11),
        'ReLU to GELU': Published(80.62, 4.15, 0.14),
        'fewer activations': Published(81.27, 4.15, 0.06),
        'fewer norms': Published(81.41, 4.15, 0.09),
        'BN to LN': Published(81.47, 4.46, 0.09),
        'separate downsampling': Published(81.97, 4.49, 0.06),
    },
    'resnet200': {
        'resnet': Published(78.2, 15.01),
        'enhanced recipe': Published(81.14, 15.01),
        'stage ratio': Published(81.33, 14.52),
        'patchify stem': Published(81.59, 14.38),
        'depthwise conv': Published(80.54, 7.23),
        'increase width': Published(81.85, 16.76),
        'inverting dimensions': Published(82.64, 15.68),
        'move up depthwise conv': Published(82.04, 14.63),
        'kernel size 5': Published(82.32, 14.7),
        'kernel size 7': Published(82.3, 14.81),
        'kernel size 9': Published(82.27, 14.95),
        'kernel size 11': Published(82.18, 15.13),
        'ReLU to GELU': Published(82.19, 14.81),
        'fewer activations': Published(82.71, 14.81),
        'fewer norms': Published(83.17, 14.81),
        'BN to LN': Published(83.35, 14.81),
        'separate downsampling': Published(83.6, 15.35),
    },
}
# Table 1.
PEERS = dict(resnet50=Peer('Swin-T', 81.3, 4.5), resnet200=Peer('Swin-B', 83.5, 15.43))
ENDS = dict(
    resnet50=('ResNet-50', 'ConvNeXt-T'), resnet200=('ResNet-200', 'ConvNeXt-B')
)
# Figure 2.
GROUPS: dict[str, tuple[str, ...]] = {
    'ResNet': ('resnet', 'enhanced recipe'),
    'macro design': ('stage ratio', 'patchify stem'),
    'ResNeXt': ('depthwise conv', 'increase width'),
    'inverted bottleneck': ('inverting dimensions',),
    'large kernel': (
        'move up depthwise conv',
        'kernel size 5',
        'kernel size 7',
        'kernel size 9',
        'kernel size 11',
    ),
    'micro design': (
        'ReLU to GELU',
        'fewer activations',
        'fewer norms',
        'BN to LN',
        'separate downsampling',
    ),
}
NOT_KEPT = ('kernel size 9', 'kernel size 11')  # the steps after them have 7
