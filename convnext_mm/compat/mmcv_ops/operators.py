"""mmcv's operators on torchvision and PyTorch: nothing has to be compiled.

A copy of this file at ``mmcv/_ext/__init__.py`` stands in for the extension that
mmcv compiles: ``mmcv.ops`` calls the functions below by the names and arguments of
``mmcv/ops/csrc/pytorch/pybind.cpp`` (mmcv 2.0 to 2.3). They write into the tensors
that they are handed, on CPUs and NVIDIA GPUs. ``python -m
convnext_mm.compat.mmcv_ops`` puts the copy there and takes it away.

Tensors in 16 bits are computed in fp32 and rounded once, at the end: boxes in
bfloat16 would lie whole pixels away. Any memory layout may come in. Whatever is
not offered here raises NotImplementedError when it is called.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from mmengine.logging import print_log
from torch import Tensor
from torchvision.ops import deform_conv2d, roi_align

# What torchvision registers has the backward pass of RoIAlign on its own: mmcv asks
# for it apart from the forward pass.
NATIVE = torch.ops.torchvision

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
]


def __getattr__(name: str) -> Callable:
    # mmcv asks on import for every operator that it has.
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operator {name!r} is not among those that convnext_mm brings on "
            'torchvision. Compile mmcv to have it: `make setup MMCV=compiled` in a '
            'checkout of convnext_mm; elsewhere, with PyTorch up to 2.11, setuptools '
            '80 and a C++ compiler, `pip uninstall` the mmcv that is there and'
            ' `pip install --no-build-isolation --no-cache-dir --no-deps '
            'onedl-mmcv==2.3.6`.'
        )

    missing.__name__ = name
    return missing


@functools.cache
def say_once() -> None:
    # On the first call and not on import: by then the run has its logger.
    print_log(
        "mmcv's operators run on torchvision "
        f'{torchvision.__version__} (convnext_mm brings them; nothing was compiled).',
        'current',
    )


def announced(operator: Callable) -> Callable:
    @functools.wraps(operator)
    def announcing(*args: Any, **kwargs: Any) -> Any:
        say_once()
        return operator(*args, **kwargs)

    return announcing


def wide(tensor: Tensor) -> Tensor:
    """fp32 for 16 bits, which is more than torchvision's kernels take."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Non-maximum suppression


@announced
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (N, 4) that stay, by falling score. ``offset`` is added
    to widths and heights."""
    # Equal scores in mmcv's order, which torchvision, sorting stably, then keeps.
    scores, order = wide(scores).sort(descending=True)
    boxes = wide(boxes)[order]
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    # mmcv compares in fp32, torchvision with the double it is given.
    return order[torchvision.ops.nms(boxes, scores, float(np.float32(iou_threshold)))]


@announced
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (arXiv:1704.04503) on the CPU: fills ``dets`` (N, 5) with the boxes
    that stay and their lowered scores, and returns their indices.

    ``method``: 0 drops what overlaps more than ``iou_threshold``, 1 lowers it
    linearly, 2 lowers everything by a Gaussian of width ``sigma``.
    """
    # Columns: x1, y1, x2, y2, score. Kept boxes come first; of the rest a dropped
    # one gives its place to the last, so that equal scores come out in mmcv's order.
    rows = torch.cat((wide(boxes), wide(scores)[:, None]), dim=1).numpy(force=True)
    rows = rows.copy()
    number = rows.dtype.type
    indices = np.arange(len(rows))
    count, kept = len(rows), 0
    while kept < count:
        best = kept + int(rows[kept:count, 4].argmax())
        for array in (rows, indices):
            array[[kept, best]] = array[[best, kept]]
        rest = rows[kept + 1 : count]
        overlap = overlaps(rows[kept], rest, number(offset))
        if method == 2:
            weight = np.exp(-(overlap * overlap) / number(sigma))
        else:
            lowered = 1 - overlap if method == 1 else 0
            weight = np.where(overlap >= number(iou_threshold), lowered, number(1))
        rest[:, 4] *= weight
        kept += 1
        place = kept
        while place < count:
            below = np.flatnonzero(rows[place:count, 4] < number(min_score))
            if not below.size:
                break
            place += int(below[0])
            count -= 1
            rows[place], indices[place] = rows[count], indices[count]
    dets[:count] = torch.from_numpy(rows[:count]).to(dets)
    return torch.from_numpy(indices[:count])


@announced
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of the boxes (N, 5), with their scores last: each that stays, and
    after it those that it suppresses, by falling score."""
    rows = wide(dets).numpy(force=True)
    waiting = dets[:, 4].sort(descending=True).indices.numpy(force=True)
    groups = []
    while waiting.size:
        overlap = overlaps(rows[waiting[0]], rows[waiting[1:]], rows.dtype.type(0))
        close = overlap >= rows.dtype.type(iou_threshold)
        groups.append([int(waiting[0]), *waiting[1:][close].tolist()])
        waiting = waiting[1:][~close]
    return groups


def overlaps(box: np.ndarray, others: np.ndarray, offset: np.floating) -> np.ndarray:
    """IoU of one box with each of others; 0, as for boxes apart, for two without
    area, where mmcv divides 0 by 0."""

    def area(x1: Any, y1: Any, x2: Any, y2: Any) -> Any:
        return (x2 - x1 + offset) * (y2 - y1 + offset)

    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:4], others[:, 2:4])
    inside = np.maximum(high - low + offset, 0).prod(axis=1)
    with np.errstate(invalid='ignore', divide='ignore'):
        iou = inside / (area(*box[:4]) + area(*others[:, :4].T) - inside)
    return np.nan_to_num(iou, nan=0)


# Pooling of regions


@announced
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign of maps (N, C, H, W) at ``rois`` (K, 5) into ``output``
    (K, C, aligned_height, aligned_width)."""
    check_average(pool_mode)
    if output.numel():
        size = (aligned_height, aligned_width)
        output.copy_(
            roi_align(
                wide(input), wide(rois), size, spatial_scale, sampling_ratio, aligned
            )
        )


@announced
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Adds the gradient of the maps to ``grad_input``."""
    check_average(pool_mode)
    if not grad_output.numel():
        return
    size = (aligned_height, aligned_width)
    gradient, rois = wide(grad_output), wide(rois)
    if needs_an_order(gradient) or not hasattr(NATIVE, '_roi_align_backward'):
        # torchvision's function knows other ways than its kernel. The values of the
        # maps do not matter to their gradient.
        with torch.enable_grad():
            maps = torch.zeros_like(grad_input, dtype=gradient.dtype)
            pooled = roi_align(
                maps.requires_grad_(),
                rois,
                size,
                spatial_scale,
                sampling_ratio,
                aligned,
            )
            (found,) = torch.autograd.grad(pooled, maps, gradient)
    else:
        found = NATIVE._roi_align_backward(
            gradient,
            rois,
            spatial_scale,
            *size,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    grad_input += found


def needs_an_order(tensor: Tensor) -> bool:
    """Whether torchvision's kernel, which adds in any order, would refuse."""
    return torch.are_deterministic_algorithms_enabled() and tensor.is_cuda


def check_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign with pool_mode='max' is not offered by torchvision, which "
            "stands in for mmcv's compiled operators here: take pool_mode='avg' (the "
            'published one), RoIPool, or compile mmcv (`make setup MMCV=compiled` '
            'in a checkout of convnext_mm).'
        )


@announced
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """The largest value of each bin of ``rois`` (K, 5), and its index in the map; 0
    and -1 for bins without pixels. torchvision rounds regions to whole pixels first,
    mmcv their bins."""
    height, width = input.shape[2:]
    corners = wide(rois)[:, 1:] * spatial_scale
    last = (wide(rois)[:, 3:] + 1) * spatial_scale
    columns = bins(corners[:, 0], last[:, 0], pooled_width, width)
    rows = bins(corners[:, 1], last[:, 1], pooled_height, height)
    nothing = (last <= corners[:, :2]).any(1)
    output.zero_()
    argmax.fill_(-1)
    for k, image in enumerate(rois[:, 0].long().tolist()):
        if nothing[k]:
            continue
        maps = wide(input[image])[:, :, None].expand(-1, -1, pooled_width, -1)
        largest, x = maps.masked_fill(~columns[k], -torch.inf).max(dim=3)
        # (C, W of the output, H): the first row that holds the largest.
        largest, x = largest.transpose(1, 2), x.transpose(1, 2)
        spread = largest[:, None].expand(-1, pooled_height, -1, -1)
        pooled, y = spread.masked_fill(~rows[k][:, None], -torch.inf).max(dim=3)
        x = x[:, None].expand_as(spread).gather(3, y[..., None])[..., 0]
        empty = pooled == -torch.inf
        output[k] = pooled.masked_fill(empty, 0)
        argmax[k] = (y * width + x).masked_fill(empty, -1)


def bins(start: Tensor, end: Tensor, number: int, size: int) -> Tensor:
    """(K, number, size): which pixels of a row or column lie in which bin."""
    step = ((end - start) / number)[:, None]
    index = torch.arange(number, device=start.device)
    low = (index * step + start[:, None]).floor()[..., None]
    high = ((index + 1) * step + start[:, None]).ceil()[..., None]
    pixel = torch.arange(size, device=start.device)
    return (pixel >= low) & (pixel < high)


@announced
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Adds the gradient of the maps to ``grad_input``."""
    channels = grad_input.size(1)
    found = torch.zeros_like(grad_input, dtype=wide(grad_output).dtype)
    # By map and channel; what lies nowhere adds 0 to the first pixel.
    maps = rois[:, :1].long() * channels + torch.arange(channels, device=rois.device)
    pixels = grad_input[0, 0].numel()
    index = maps[:, :, None, None] * pixels + argmax.clamp_min(0)
    values = wide(grad_output) * (argmax >= 0)
    found.view(-1).index_add_(0, index.flatten(), values.flatten())
    grad_input += found


# Focal loss (arXiv:1708.02002)


@announced
def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Loss of each logit (N, C) for classes ``target`` (N,), where C and -1 are
    background; ``weight`` of each class may be empty."""
    logit = wide(input)
    log_p, log_q = F.logsigmoid(logit), F.logsigmoid(-logit)
    loss = torch.where(
        of_class(target, logit),
        -alpha * (gamma * log_q).exp_() * log_p,
        (alpha - 1) * (gamma * log_p).exp_() * log_q,
    )
    output.copy_(loss * class_weight(weight, target, input.size(1))[:, None])


@announced
def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Slope of each loss with respect to its logit."""
    logit = wide(input)
    log_p, log_q = F.logsigmoid(logit), F.logsigmoid(-logit)
    p, q = log_p.exp(), log_q.exp()
    slope = torch.where(
        of_class(target, logit),
        alpha * (gamma * log_q).exp_() * (gamma * p * log_p - q),
        (1 - alpha) * (gamma * log_p).exp_() * (p - gamma * q * log_q),
    )
    grad_input.copy_(slope * class_weight(weight, target, input.size(1))[:, None])


def of_class(target: Tensor, logit: Tensor) -> Tensor:
    return target[:, None] == torch.arange(logit.size(1), device=logit.device)


def class_weight(weight: Tensor, target: Tensor, classes: int) -> Tensor:
    """The weight of each sample, 1 where there are none.

    Raises:
        ValueError: There are weights, and a target that has none.
    """
    if not weight.numel():
        return torch.ones(len(target), device=target.device)
    if ((target < 0) | (target >= classes)).any():
        raise ValueError(
            f'a focal loss with weights for {classes} classes got targets from '
            f'{int(target.min())} to {int(target.max())}: background has no weight '
            f'here, so targets must be 0 to {classes - 1} (or leave weight out).'
        )
    return wide(weight)[target]


@announced
def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Loss (N,) of probabilities ``input`` (N, C); 0 where ``target`` is
    negative."""
    p, scale = of_target(input, target, weight)
    output.copy_(-alpha * scale * (1 - p).pow(gamma) * log_of(p))


@announced
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Slope of each loss with respect to the logits behind the probabilities."""
    p, scale = of_target(input, target, weight)
    slope = gamma * (1 - p).pow(gamma - 1) * p * log_of(p) - (1 - p).pow(gamma)
    slope = alpha * scale * slope
    grad_input.copy_(slope[:, None] * (of_class(target, input).float() - wide(input)))


def of_target(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of each sample's class, and its weight, 0 if it has none."""
    counted = target >= 0
    label = torch.where(counted, target, 0)
    scale = class_weight(weight, label, input.size(1)) * counted
    return wide(input).gather(1, label[:, None])[:, 0], scale


def log_of(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


# Deformable convolution (arXiv:1703.06211, arXiv:1811.11168)


@announced
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Version 1, which has neither mask nor bias, into ``output``."""
    output.copy_(convolve((input, weight, offset), geometry))


@announced
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Adds the gradients of input and offset."""
    by_weight = torch.zeros_like(weight)
    found = (gradInput, by_weight, gradOffset)
    convolve_backward(gradOutput, (input, weight, offset), found, geometry)
    # torchvision computes all gradients at once. mmcv's second call, for the weight,
    # is handed the same buffer.
    columns.resize_(weight.shape).copy_(by_weight)


@announced
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry: int,
) -> None:
    """Adds ``scale`` times the gradient of the weight."""
    by_weight = columns.clone()
    columns.resize_(0)
    if not by_weight.numel():  # neither input nor offset wanted a gradient
        by_weight = torch.zeros_like(gradWeight)
        # The values of the weight do not matter to its gradient.
        inputs = (input, gradWeight, offset)
        convolve_backward(gradOutput, inputs, (None, by_weight, None), geometry)
    gradWeight.add_(by_weight, alpha=scale)


@announced
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Version 2 into ``output``."""
    inputs = (input, weight, offset, mask, *[bias] * with_bias)
    output.copy_(convolve(inputs, geometry))


@announced
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Adds the gradients of everything."""
    inputs = (input, weight, offset, mask, *[bias] * with_bias)
    found = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias)
    convolve_backward(grad_output, inputs, found, geometry)


def convolve(inputs: Sequence[Tensor], geometry: dict[str, int]) -> Tensor:
    """``inputs``: what is convolved (N, C, H, W), weight, offset, and if there are
    any mask and bias. ``geometry``: as mmcv names it, for version 1 or 2; sizes of
    kernels and groups show in the inputs."""

    def pair(name: str) -> tuple[int, int]:
        return geometry[name.format('H', 'h')], geometry[name.format('W', 'w')]

    image, weight, offset, *others = map(wide, inputs)
    mask, bias = [*others, None, None][:2]
    names = ('stride_{1}', 'pad_{1}', 'dilation_{1}')
    if 'dH' in geometry:
        names = ('d{0}', 'pad{0}', 'dilation{0}')
    return deform_conv2d(image, offset, weight, bias, *map(pair, names), mask)


def convolve_backward(
    gradient: Tensor,
    inputs: Sequence[Tensor],
    found: Sequence[Tensor | None],
    geometry: dict[str, int],
) -> None:
    """Adds the gradients of ``inputs`` to the tensors ``found``."""
    with torch.enable_grad():
        leaves = [wide(x).detach().requires_grad_() for x in inputs]
        output = convolve(leaves, geometry)
        gradients = torch.autograd.grad(output, leaves, wide(gradient))
    for tensor, value in zip(found, gradients):
        if tensor is not None:
            tensor += value


# Multi-scale deformable attention (arXiv:2010.04159), which mmcv asks for on GPUs


@announced
def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """What mmcv computes on CPUs, of shape (N, queries, heads * channels)."""
    shapes = value_spatial_shapes
    weights = wide(attention_weights)
    return attend(wide(value), shapes, wide(sampling_locations), weights).to(value)


@announced
def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Adds the gradients; computes the forward pass again for them."""
    with torch.enable_grad():
        value, locations, weights = (
            wide(x).detach().requires_grad_()
            for x in (value, sampling_locations, attention_weights)
        )
        attended = attend(value, value_spatial_shapes, locations, weights)
        gradients = torch.autograd.grad(
            attended, (value, locations, weights), wide(grad_output)
        )
    for tensor, gradient in zip(
        (grad_value, grad_sampling_loc, grad_attn_weight), gradients
    ):
        tensor += gradient


def attend(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)


# What mmcv.utils.collect_env prints


def get_compiler_version() -> str:
    return f'none: operators of torchvision {torchvision.__version__}'


def get_compiling_cuda_version() -> str:
    return 'none'
