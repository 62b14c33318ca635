"""Names of PyTorch and Triton that no version promises, and what runs without."""

import functools
from importlib import import_module

import torch
from mmengine.logging import print_log

PRIVATE_NAMES = {
    'torch.ops.mkldnn._linear_pointwise': "fp32 products take PyTorch's own way",
    'torch.ops.mkldnn._reorder_linear_weight': (
        'deployed weights keep the order that they have'
    ),
    'torch.ops.mkldnn._is_mkldnn_bf16_supported': (
        'deployed bf16 weights keep the order that they have'
    ),
    'torch.ops.aten.native_layer_norm_backward': "impl='eager' runs, not 'lean'",
    'torch.ops.aten.convolution_backward': "impl='eager' runs, not 'lean'",
    'torch.ops.aten.gelu_backward': "impl='eager' runs, not 'lean'",
    'torch.ops.aten.gelu_': 'GELU takes new memory',
    'torch.autograd.forward_ad._current_level': "impl='auto' is 'eager'",
    'torch._C._functorch.peek_interpreter_stack': "impl='auto' is 'eager'",
    'torch._C._len_torch_dispatch_stack': "small maps wait for PyTorch's dispatcher",
    'torch.autograd.profiler._is_profiler_enabled': (
        "small maps wait for PyTorch's dispatcher"
    ),
    'torch._foreach_copy_': 'statistics of batch norm are copied one by one',
    'torch._foreach_norm': 'norms of gradients are computed one by one',
    'torch._dynamo.config.recompile_limit': 'compiled peers may be compiled less often',
    'triton.knobs.runtime.interpret': "Triton's interpreter is not used",
}


@torch.compiler.assume_constant_result
def has(name: str) -> bool:
    """Whether this PyTorch has one of ``PRIVATE_NAMES``. Where it has not, the log
    says once what runs instead."""
    return _has(name)


@functools.cache
def _has(name: str) -> bool:
    instead = PRIVATE_NAMES[name]
    package, *rest = name.split('.')
    try:
        functools.reduce(getattr, rest, import_module(package))
    except (AttributeError, ImportError):
        print_log(f'PyTorch {torch.__version__} has no {name}: {instead}.', 'current')
        return False
    return True


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN's matrix products take a dtype on this CPU: bf16 needs AVX-512
    or its like."""
    name = 'torch.ops.mkldnn._is_mkldnn_bf16_supported'
    return dtype == torch.float32 or (
        dtype == torch.bfloat16
        and has(name)
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
