"""Mixed precision in bfloat16 where device and model allow it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper as MMEngineAmpOptimWrapper
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from convnext_mm.compat import mmcv_ops
from convnext_mm.registry import OPTIM_WRAPPERS, register

DTYPES = ('auto', 'bfloat16', 'float16')
# Of mmcv's compiled operators this one alone takes another way for bfloat16 itself.
HANDLES_BF16 = 'mmcv.ops.multi_scale_deform_attn'
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Base classes in MMDetection, and what of mmcv computes in fp32 in them.
BOX_PREDICTORS = ('BaseDenseHead', 'BBoxHead')
ROI_EXTRACTOR = 'BaseRoIExtractor'
SERVED = ('RoIAlign', 'RoIPool')


@register(OPTIM_WRAPPERS)
class AmpOptimWrapper(MMEngineAmpOptimWrapper):
    """MMEngine's mixed precision, which picks the dtype.

    bfloat16 has the range of fp32: nothing overflows, no loss scale is needed
    and no step is skipped. It is used where the device computes in it (GPUs
    from compute capability 8.0, CPUs with AVX512-BF16 or AMX) and the model
    runs no operator of mmcv that lacks it. Elsewhere it is float16 with a loss
    scale on GPUs, and fp32 on CPUs. What was picked is logged.

    With bfloat16, what MMDetection 2 kept in fp32 under mixed precision is so
    here too: what heads predict for boxes, and the maps that boxes are pooled
    from. MMDetection 3 takes anchors and boxes to the dtype of the prediction,
    where bfloat16 rounds a coordinate of 1000 to a multiple of 4.

    No operator that mmcv 2.3 compiles has bfloat16. The above serves its NMS,
    RoIAlign and focal loss; models with others of them (deformable convolution,
    SyncBN of its own, ...) get float16. Those on torchvision
    (:mod:`convnext_mm.compat.mmcv_ops`) take any dtype, so that every model gets
    bfloat16.

    Args:
        dtype: ``'auto'``, or ``'bfloat16'`` or ``'float16'`` whatever the
            device and the model.
        loss_scale: MMEngine's, for float16 on a GPU.
        use_fsdp, **kwargs: MMEngine's.

    Raises:
        ValueError: ``dtype`` is none of these, or ``'float16'`` on a CPU.
    """

    def __init__(
        self,
        dtype: str | torch.dtype = 'auto',
        loss_scale: str | float | dict = 'dynamic',
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(dtype, torch.dtype):
            dtype = str(dtype).replace('torch.', '')
        if dtype not in DTYPES:
            raise ValueError(f'dtype must be one of {DTYPES}, got {dtype!r}')
        self._requested: str | None = dtype
        self._resolved = False
        self._enabled = True
        self._device = get_device()
        if self._device != 'cpu':
            super().__init__(loss_scale=loss_scale, use_fsdp=use_fsdp, **kwargs)
            return
        if dtype == 'float16':
            raise ValueError(
                "dtype='float16' needs a GPU; on a CPU mixed "
                "precision is 'bfloat16' (or 'auto')"
            )
        # MMEngine's __init__ refuses a CPU.
        OptimWrapper.__init__(self, **kwargs)
        self.loss_scaler = GradScaler('cpu', enabled=False)
        self._scale_update_param = None
        self.cast_dtype: torch.dtype | None = None

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a forward pass in training."""
        if not self._resolved:  # here the model is seen for the first time
            self._resolve(model)
        with (
            OptimWrapper.optim_context(self, model),
            autocast(dtype=self.cast_dtype, enabled=self._enabled),
        ):
            yield

    def load_state_dict(self, state_dict: dict) -> None:
        """As MMEngine's; also from a run in the other dtype."""
        state_dict = dict(state_dict)
        if not state_dict.get('loss_scaler'):  # bfloat16 has no scale to load
            state_dict.pop('loss_scaler', None)
        super().load_state_dict(state_dict)

    def _resolve(self, model: nn.Module) -> None:
        dtype, reason = self._requested, 'as requested'
        if dtype == 'auto':
            dtype, reason = self._pick(model)
        if dtype == 'bfloat16':
            self.cast_dtype = torch.bfloat16
            self.loss_scaler = type(self.loss_scaler)(enabled=False)
            keep_boxes_in_fp32(model)
        elif dtype == 'float16':
            self.cast_dtype = torch.float16
        else:
            self._enabled = False
        self._resolved = True
        print_log(
            f'Training on {self._device} in {dtype or "full"} precision: {reason}.',
            'current',
        )

    def _pick(self, model: nn.Module) -> tuple[str | None, str]:
        """The dtype, None for fp32, and why."""
        fallback = None if self._device == 'cpu' else 'float16'
        if not has_bf16(self._device):
            return fallback, 'the device has no bfloat16 arithmetic'
        blocking = modules_without_bf16(model, self._device)
        if blocking:
            return fallback, (f'{", ".join(blocking[:3])}: mmcv has no bfloat16 for it')
        return 'bfloat16', 'device and model allow it'


def has_bf16(device: str) -> bool:
    """Whether a type of device computes in bfloat16, not by emulation."""
    if device == 'cuda':
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= (
            8,
            0,
        )
    if device == 'cpu':
        # Older PyTorch cannot tell, and emulation is slower than fp32.
        return any(
            getattr(torch.cpu, name, bool)()
            for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
        )
    return False


def modules_without_bf16(model: nn.Module, device: str | None = None) -> list[str]:
    """Names and types of what runs an operator that mmcv compiled, which has no
    bfloat16, leaving out what :func:`keep_boxes_in_fp32` serves.

    Args:
        model: The model.
        device: Type of device; by default the one MMEngine picks.
    """
    device = device or get_device()
    if mmcv_ops.in_use():
        return []
    found, served = [], []
    for name, module in model.named_modules():
        if _is_of_mmdet(module, (*BOX_PREDICTORS, ROI_EXTRACTOR)):
            served.append(f'{name}.')
        within = name.startswith(tuple(served))
        compiled = not (within and type(module).__name__ in SERVED) and any(
            cls.__module__.startswith('mmcv.ops.') and cls.__module__ != HANDLES_BF16
            for cls in type(module).__mro__
        )
        # On GPUs the frameworks' focal losses call mmcv's; on CPUs they do not.
        focal = (
            not within
            and device != 'cpu'
            and type(module).__name__ == 'FocalLoss'
            and getattr(module, 'use_sigmoid', False)
        )
        if compiled or focal:
            found.append(f'{name} ({type(module).__name__})')
    return found


def keep_boxes_in_fp32(model: nn.Module) -> None:
    """Makes MMDetection's heads predict boxes and their scores, and its RoI
    extractors read maps, in fp32 also under autocast."""
    for module in model.modules():
        if _is_of_mmdet(module, BOX_PREDICTORS):
            module.register_forward_hook(_predict_fp32)
        elif _is_of_mmdet(module, (ROI_EXTRACTOR,)):
            module.register_forward_pre_hook(_read_fp32)


def _is_of_mmdet(module: nn.Module, names: tuple[str, ...]) -> bool:
    # By name: the package must not need MMDetection.
    return any(
        cls.__name__ in names and cls.__module__.startswith('mmdet.')
        for cls in type(module).__mro__
    )


def _predict_fp32(module: nn.Module, inputs: tuple, output: Any) -> Any:
    return _to_fp32(output)


def _read_fp32(module: nn.Module, inputs: tuple) -> tuple:
    return _to_fp32(inputs)


def _to_fp32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF_DTYPES else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_to_fp32, value))
    return value
