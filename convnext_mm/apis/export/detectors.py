"""Detectors of MMDetection as graphs of fixed output sizes: what a detector finds
comes first, the rest has score 0."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.rpn_head import RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from convnext_mm.engine.errors import ConfigError

from .networks import Network, WholeNetwork


class Boxes(NamedTuple):
    """(n, 4) corners x1, y1, x2, y2 in pixels; (n,) scores, 0 where there is no box;
    (n,) labels."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class _Detector(WholeNetwork):
    """Of one image. MMDetection's modules compute the maps; from there on this is
    MMDetection's arithmetic without branches that ask for values."""

    batch = False

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        self.divisor = model.data_preprocessor.pad_size_divisor
        self.pad_value = float(model.data_preprocessor.pad_value)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Those of the neck."""
        return self.model.extract_feat(self.prepare(images))


class OneStageNetwork(_Detector):
    """Images to boxes (n, 4) x1, y1, x2, y2 in pixels of the image, scores (n,) and
    labels (n,) int64, n = max_per_img."""

    outputs = 'boxes', 'scores', 'labels'

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        head, cfg = self.model.bbox_head, self.model.test_cfg
        found = dense_boxes(
            head, self.maps(images), images, cfg.nms_pre, cfg.score_thr, cfg
        )
        return tuple(found)


class TwoStageNetwork(_Detector):
    """The same, and with a mask head masks (n, h, w): probabilities on a grid over
    each box."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__(model, dtype)
        head = model.roi_head
        self.outputs = 'boxes', 'scores', 'labels'
        if head.with_mask:
            self.outputs += ('masks',)
        is_cascade = isinstance(head, CascadeRoIHead)
        # One head is a cascade of one stage.
        self.box_stages = _stages(head, 'bbox', is_cascade)
        self.mask_stages = _stages(head, 'mask', is_cascade) if head.with_mask else []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps, rpn = self.maps(images), self.model.rpn_head
        cfg = self.model.test_cfg.rpn
        proposals = dense_boxes(rpn, maps, images, cfg.nms_pre, 0, cfg)
        found = self.classify(maps, proposals, images)
        if not self.mask_stages:
            return tuple(found)
        return *found, self.masks(maps, found)

    def classify(
        self, maps: tuple[Tensor, ...], proposals: Boxes, images: Tensor
    ) -> Boxes:
        rois, logits = proposals.boxes, []
        for index, (extractor, head) in enumerate(self.box_stages):
            features = roi_features(extractor, maps, rois).to(self.dtype)
            score, delta = (x.float() for x in head(features))
            logits.append(score)
            if index < len(self.box_stages) - 1:
                best = score[:, :-1].argmax(1)
                rois = _clip(_decode(head, rois, delta, best), images)
        scores = (sum(logits) / len(logits)).softmax(1)[:, :-1]
        boxes = _clip(_decode(head, rois, delta), images)  # (n, classes or 1, 4)
        classes = scores.shape[1]
        cfg = self.model.roi_head.test_cfg
        return suppress(
            boxes.expand(-1, classes, 4).reshape(-1, 4),
            # Proposals that fill up are none.
            torch.where(proposals.scores[:, None] > 0, scores, -1).reshape(-1),
            torch.arange(classes, device=scores.device)
            .expand(len(scores), -1)
            .reshape(-1),
            cfg.score_thr,
            cfg,
        )

    def masks(self, maps: tuple[Tensor, ...], found: Boxes) -> Tensor:
        each = []
        for extractor, head in self.mask_stages:
            features = roi_features(extractor, maps, found.boxes)
            probability = head(features.to(self.dtype)).float().sigmoid()
            if head.class_agnostic:
                each.append(probability[:, 0])
            else:
                rows = torch.arange(len(probability), device=probability.device)
                each.append(probability[rows, found.labels])
        return sum(each) / len(each)


def _stages(head: Any, kind: str, is_cascade: bool) -> list[tuple[Any, Any]]:
    extractors = getattr(head, f'{kind}_roi_extractor')
    heads = getattr(head, f'{kind}_head')
    return list(zip(extractors, heads)) if is_cascade else [(extractors, heads)]


def dense_boxes(
    head: Any,
    maps: tuple[Tensor, ...],
    images: Tensor,
    count: int,
    threshold: float,
    cfg: Any,
) -> Boxes:
    """Boxes of a head that predicts at every place of its maps.

    Args:
        head: Of MMDetection, an RPN among them.
        maps: Of the neck, for one image.
        images: (1, 3, H, W).
        count: Of candidates for each map, the best ones.
        threshold: Lower scores are left out.
        cfg: The head's ``test_cfg``.
    """
    predicted = head(maps)
    scores, deltas = predicted[:2]
    factors = predicted[2] if len(predicted) > 2 else [None] * len(scores)
    priors = head.prior_generator.grid_priors(
        [x.shape[-2:] for x in scores], torch.float32, images.device
    )
    is_rpn = isinstance(head, RPNHead)
    found = []
    for level, (score, delta, factor, prior) in enumerate(
        zip(scores, deltas, factors, priors)
    ):
        score = _rows(score, head.cls_out_channels)
        score = score.sigmoid() if head.use_sigmoid_cls else score.softmax(-1)[:, :-1]
        classes = score.shape[1]
        # A map may have fewer places: filled up, there are always enough.
        best, index = F.pad(score.reshape(-1), (0, count), value=-1).topk(count)
        is_place = best > threshold
        index = torch.where(is_place, index, 0)
        place = index.div(classes, rounding_mode='floor')
        if factor is not None:
            best = best * _rows(factor, 1)[:, 0].sigmoid()[place]
        boxes = head.bbox_coder.decode(prior[place], _rows(delta, 4)[place])
        # An RPN suppresses within a map, others within a class.
        label = torch.full_like(index, level) if is_rpn else index % classes
        found.append(Boxes(boxes, torch.where(is_place, best, -1), label))
    boxes, best, labels = (torch.cat(values) for values in zip(*found))
    boxes = _clip(boxes, images)
    smallest = cfg.get('min_bbox_size', -1)
    if smallest >= 0:
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        best = torch.where((width > smallest) & (height > smallest), best, -1)
    # Candidates were chosen by score alone: a centre-ness does not drop any.
    return suppress(boxes, best, labels, -0.5, cfg)


def _rows(x: Tensor, channels: int) -> Tensor:
    """(1, k channels, H, W) to (H W k, channels) in fp32."""
    return x[0].float().permute(1, 2, 0).reshape(-1, channels)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, cfg: Any
) -> Boxes:
    """Non-maximum suppression within each group.

    Args:
        boxes: (n, 4) x1, y1, x2, y2.
        scores: (n,).
        groups: (n,) int64.
        threshold: Boxes with a score above it take part.
        cfg: With ``nms.iou_threshold`` and ``max_per_img``.

    Returns:
        ``max_per_img`` boxes by score; scores, boxes and groups are 0 where there
        are fewer.
    """
    count = cfg.max_per_img
    # Groups are moved apart, so that their boxes do not meet.
    offset = groups.to(boxes.dtype) * (boxes.max() + 1)
    (taking_part,) = (scores > threshold).nonzero(as_tuple=True)
    # What fills up takes part as well, without area: no box suppresses it, so that
    # there is always enough to choose from.
    filling = torch.arange(count, device=scores.device) + len(scores)
    boxes, apart = (
        F.pad(x, (0, 0, 0, count)) for x in (boxes, boxes + offset[:, None])
    )
    scores, groups = F.pad(scores, (0, count), value=-1), F.pad(groups, (0, count))
    index = torch.cat((taking_part, filling))
    index = index[
        torchvision.ops.nms(apart[index], scores[index], cfg.nms.iou_threshold)
    ]
    best, order = scores[index].topk(count)
    index = index[order]
    return Boxes(boxes[index], best.clamp(min=0), groups[index])


def _decode(
    head: Any, rois: Tensor, delta: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Boxes of a stage: (n, 4) with labels, else (n, classes or 1, 4)."""
    delta = delta.reshape(len(rois), -1, 4)
    if labels is None:
        spread = rois[:, None].expand_as(delta).reshape(-1, 4)
        return head.bbox_coder.decode(spread, delta.reshape(-1, 4)).view_as(delta)
    if not head.reg_class_agnostic:
        rows = torch.arange(len(rois), device=rois.device)
        return head.bbox_coder.decode(rois, delta[rows, labels])
    return head.bbox_coder.decode(rois, delta[:, 0])


def _clip(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes (..., 4) within the image."""
    height, width = images.shape[2:]
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), -1).flatten(-2)


def roi_features(extractor: Any, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
    """(n, C, h, w) in fp32: each box from the map that suits its size."""
    rois = F.pad(boxes, (1, 0))  # the image's index
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    out = maps[0].new_zeros(
        len(rois), maps[0].shape[1], *layers[0].output_size, dtype=torch.float32
    )
    for level, (x, layer) in enumerate(zip(maps, layers)):
        (index,) = (levels == level).nonzero(as_tuple=True)
        features = torchvision.ops.roi_align(
            x.float(),
            rois[index],
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        out = out.index_copy(0, index, features)
    return out


def detector_network(model: Any, dtype: torch.dtype) -> Network:
    """What is exported of a detector.

    Raises:
        ConfigError: One of its parts cannot be exported; the message says which, and
            what can.
    """
    if hasattr(model, 'roi_head'):
        _check_two_stage(model)
        return TwoStageNetwork(model, dtype)
    head = model.bbox_head
    if (
        not isinstance(head, BaseDenseHead)
        or type(head)._predict_by_feat_single
        is not BaseDenseHead._predict_by_feat_single
    ):
        _refuse(head, 'RetinaNet, FCOS, ATSS, RTMDet, and Mask and Cascade R-CNN')
    _check_dense(head, model.test_cfg)
    return OneStageNetwork(model, dtype)


def _check_two_stage(model: Any) -> None:
    head = model.roi_head
    if type(model.rpn_head) is not RPNHead:
        _refuse(model.rpn_head, 'RPNHead')
    _check_dense(model.rpn_head, model.test_cfg.rpn, 'rpn.')
    if type(head) not in (StandardRoIHead, CascadeRoIHead):
        _refuse(head, 'StandardRoIHead and CascadeRoIHead')
    if head.with_shared_head:
        _refuse(head.shared_head, 'heads without a shared one')
    for stage in _listed(head.bbox_head):
        if (
            type(stage)._predict_by_feat_single is not BBoxHead._predict_by_feat_single
            or stage.custom_cls_channels
            or not stage.with_reg
        ):
            _refuse(stage, 'box heads of scores by softmax and boxes')
    for stage in _listed(head.mask_head) if head.with_mask else ():
        if type(stage) is not FCNMaskHead:
            _refuse(stage, 'FCNMaskHead')
    _check_nms(head.test_cfg.nms, 'rcnn.')


def _check_dense(head: Any, cfg: Any, part: str = '') -> None:
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        _refuse(head.loss_cls, 'losses on a class each')
    if cfg.get('nms_pre', -1) <= 0:
        raise ConfigError(
            f'nms_pre={cfg.get("nms_pre", -1)} of {type(head).__name__} keeps every '
            'place of a map: set one to export the model, with --cfg-options '
            f'model.test_cfg.{part}nms_pre=1000'
        )
    _check_nms(cfg.nms, part)


def _check_nms(cfg: Any, part: str) -> None:
    if cfg.get('type', 'nms') != 'nms' or cfg.get('class_agnostic', False):
        raise ConfigError(
            f'nms={dict(cfg)} cannot be exported: only type="nms" within each class '
            f'can; override it with --cfg-options model.test_cfg.{part}nms.type=nms'
        )


def _listed(heads: Any) -> list[Any]:
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def _refuse(part: object, known: str) -> None:
    raise ConfigError(
        f'a detector with {type(part).__name__} cannot be exported whole; what can: '
        f'{known}. --part backbone exports the backbone of any model'
    )
