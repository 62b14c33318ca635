"""What takes seconds and is not ours, done once or left out."""

import functools
import inspect
import math
import operator

import numpy as np


def quick_configs() -> None:
    """MMEngine lays the text of a config out six times in a run, which nobody
    reads here, and reads a hundred YAML files for each ``mmdet::``."""
    from mmengine.config import utils
    from yapf.yapflib import yapf_api

    yapf_api.FormatCode = lambda text, **_: (text, True)
    utils.load = functools.cache(utils.load)


def quick_interpreter() -> None:
    """Triton's interpreter in a third of the time: it makes the same shapes,
    types and tables anew for every operation on a tile. What kernels compute
    stays as it is; an integer overflow, which it looks for and ignores, fails."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    unwrap = core._unwrap_if_constexpr
    plain = core.tensor, int, str, bool, type(None), core.dtype, core.block_type

    def unwrap_once(value):
        return value if type(value) in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_once

    @functools.cache
    def constants(sizes):
        values = core.tuple([core.constexpr(size) for size in sizes])
        return values, core.constexpr(math.prod(sizes))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(
            tuple(type.shape.values) if type.is_block() else ()
        )

    core.tensor.__init__ = init_tensor

    init_block, blocks = core.block_type.__init__, {}

    def init_block_type(self, element_ty, shape):
        key = element_ty.name, *map(unwrap_once, shape)
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name, key[1:]
        self.element_ty = element_ty
        self.shape, self.numel, self.name, self.sizes = blocks[key]

    core.block_type.__init__ = init_block_type

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_others(self, lhs, rhs):
        sizes = [value.type.is_block() and value.type.sizes for value in (lhs, rhs)]
        return (lhs, rhs) if sizes[0] == sizes[1] else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_others

    def check_overflow(self, lhs, rhs, operation):
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        values = [value.handle.data.astype(np.int64) for value in (lhs, rhs)]
        result = getattr(operator, operation.__name__)(*values)
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        fits = low <= result.min() and result.max() <= high
        assert fits, f'{kind} overflow in {operation.__name__}'

    TritonSemantic.binary_op_sanitize_overflow_impl = check_overflow

    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type_once(dtype):
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    interpreter._get_np_dtype = numpy_type_once

    names = functools.cache(
        lambda place: [n for n, v in inspect.getmembers(place) if core.is_builtin(v)]
    )

    def patch_builtin(place, builder, scope):
        for name in names(place):
            member = getattr(place, name)
            if core.is_builtin(member):
                interpreter._patch_attr(place, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
