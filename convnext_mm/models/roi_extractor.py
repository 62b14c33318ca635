"""RoI features from maps of any dtype and memory layout, for MMDetection."""

import torch
from mmdet.models import SingleRoIExtractor as MMDetSingleRoIExtractor
from torch import Tensor


class SingleRoIExtractor(MMDetSingleRoIExtractor):
    """MMDetection's, with maps handed to RoIAlign in fp32 and contiguous.

    mmcv's RoIAlign reads channels-last memory as if it were contiguous, which
    gives garbage without an error. It has no bfloat16 either, and in 16 bits
    the corners of boxes are rounded to several pixels: MMDetection 2, with
    which the recipes were published, ran this in fp32 too.
    """

    def forward(
        self,
        feats: tuple[Tensor, ...],
        rois: Tensor,
        roi_scale_factor: float | None = None,
    ) -> Tensor:
        """Features of each box.

        Args:
            feats: Maps (N, C, H_i, W_i), one for each of ``featmap_strides``.
            rois: (K, 5): index of the image, then x1, y1, x2, y2 in pixels.
            roi_scale_factor: Boxes are scaled by it about their centres.

        Returns:
            (K, C, h, w) of the roi layer's output size, in fp32 (fp64 for maps
            in fp64).
        """
        feats = tuple(
            x.to(
                torch.promote_types(x.dtype, torch.float32),
                memory_format=torch.contiguous_format,
            )
            for x in feats
        )
        return super().forward(feats, rois, roi_scale_factor)
