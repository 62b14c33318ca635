"""What a checkpoint's pickle asks for, found by running it on stand-ins.

A pickle is a program. PyTorch's ``weights_only`` unpickler is the gate: it
decides what may be made, and runs nothing else. What it does not look at is
looked at here before, on the same bytes: keys that are doubled, or that collide
so that a small file takes for ever; NumPy types that hold pointers; and every
name that the file asks for, so that a refusal can list them. Python's own
unpickler runs the program with nothing behind the names: nothing is imported.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .errors import CheckpointFileError, UnsafeCheckpointError, shown

HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
ONE_CYCLE = 'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler'
CLASSES = ('argparse.Namespace', HISTORY_BUFFER)
MAPPINGS = (
    'mmengine.config.config.ConfigDict',
    'mmcv.utils.config.ConfigDict',
    'addict.addict.Dict',
)
PATHS = tuple(
    f'pathlib.{local}{name}'
    for local in ('', '_local.')
    for name in ('PosixPath', 'WindowsPath', 'PurePosixPath', 'PureWindowsPath')
)
DATES = tuple(
    f'datetime.{name}' for name in ('datetime', 'date', 'time', 'timedelta', 'timezone')
)
# Named as the default of a defaultdict, and never called.
ONLY_NAMED = tuple(
    f'builtins.{name}' for name in ('list', 'dict', 'int', 'float', 'str', 'bool')
)
# Of NumPy before version 2, and since.
ARRAY_CALLS, SCALAR_CALLS = (
    tuple(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core'))
    for name in ('_reconstruct', 'scalar')
)
# Large integers can be made to collide in a dictionary, and so can tuples. A
# file with more than a few such keys is no checkpoint.
LARGE_KEY = 2**20
MAX_ODD_KEYS = 5000
MAX_PARTS = 16
# What calls may copy, in times the pickle: one that is used again and again
# could make a small file a large one.
MAX_COPIES = 8


@dataclass(frozen=True)
class Name:
    """For a class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class StandIn:
    """For what a call gives: what was called, and with how much."""

    name: str
    size: int = 1


def _is_number_dtype(code: Any, *options: Any) -> bool:
    # Others can hold pointers, or be of any size.
    return (
        type(code) is str
        and re.fullmatch(r'[biufc]\d{1,2}|[SU]\d{1,3}', code) is not None
    )


def _is_dtype_state(state: Any) -> bool:
    # (version, byte order, no sub-array, names, fields, size, alignment, flags)
    return (
        type(state) is tuple
        and len(state) == 8
        and state[0] in (3, 4)
        and state[1] in ('<', '>', '|', '=')
        and state[2:5] == (None,) * 3
        and state[7] == 0
        and all(type(n) is int and n < 4000 for n in state[5:7])
    )


def _is_array_state(state: Any) -> bool:
    # (version, shape, dtype, order, data)
    return (
        type(state) is tuple
        and len(state) == 5
        and getattr(state[2], 'name', None) == 'numpy.dtype'
    )


def _size(value: Any) -> int:
    """About how much a call copies of an argument."""
    if isinstance(value, tuple):
        return len(value) + sum(
            _size(item) for item in value if type(item) is not tuple
        )
    if isinstance(value, (str, bytes, list, dict)):
        return len(value)
    return getattr(value, 'size', 1)


# Methods that MMEngine stores by name.
METHODS = {
    HISTORY_BUFFER: ('min', 'max', 'current', 'mean'),
    ONE_CYCLE: ('_annealing_cos', '_annealing_linear'),
}
# What may be called, and whether its arguments are those of a checkpoint.
CALLS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(
        (
            'torch._utils._rebuild_tensor',
            'torch._utils._rebuild_tensor_v2',
            'torch._utils._rebuild_tensor_v3',
            'torch._utils._rebuild_parameter',
            'torch._utils._rebuild_meta_tensor_no_storage',
            'torch.Size',
            'torch.device',
            'collections.defaultdict',
            'collections.deque',
            'builtins.complex',
            *SCALAR_CALLS,
            *PATHS,
            *DATES,
        ),
        lambda *_: True,
    ),
    'collections.OrderedDict': lambda: True,
    'builtins.bytes': lambda: True,
    # Pickle protocol 2 spells bytes as latin-1 text.
    '_codecs.encode': lambda text, encoding: encoding == 'latin1',
    'numpy.dtype': _is_number_dtype,
    # NumPy makes an empty array first; shape and data follow as its state.
    **dict.fromkeys(
        ARRAY_CALLS,
        lambda cls, shape, code: cls == Name('numpy.ndarray') and shape == (0,),
    ),
    # MMEngine stores methods of these beside their values. The reader answers
    # this with a function of its own, never with getattr.
    'builtins.getattr': lambda cls, name: name in METHODS[cls.name],
    **dict.fromkeys(
        ('collections.Counter', *MAPPINGS), lambda content={}: type(content) is dict
    ),
}
# Calls whose result later instructions fill.
CONTAINERS: dict[str, type] = {
    'collections.OrderedDict': OrderedDict,
    'collections.deque': list,
    **dict.fromkeys(
        ('collections.Counter', 'collections.defaultdict', *MAPPINGS), dict
    ),
}
SETS = ('builtins.set', 'builtins.frozenset')
KNOWN = {
    *CALLS,
    *SETS,
    *CLASSES,
    *ONLY_NAMED,
    'numpy.ndarray',
    ONE_CYCLE,
    'torch.storage.UntypedStorage',
}
# What torch.save writes.
OPCODES = (
    'PROTO STOP MARK NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT '
    'BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING TUPLE '
    'TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS BINGET LONG_BINGET '
    'BINPUT LONG_BINPUT GLOBAL REDUCE NEWOBJ BUILD BINPERSID'
).split()


class _DryRun(pickle._Unpickler):
    """Python's unpickler, with stand-ins for all that is no plain data."""

    dispatch: ClassVar[dict[int, Callable]] = {}
    # Of Python's unpickler, which its annotations leave out.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    proto: int

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding='utf-8')
        self.refused: dict[str, None] = {}
        self.num_odd_keys = 0
        self.to_copy = MAX_COPIES * len(file.getbuffer()) + 10_000

    def find_class(self, module: str, name: str) -> Name:
        module = {'__builtin__': 'builtins'}.get(module, module)
        full = f'{module}.{name}'
        if not (
            full in KNOWN
            or re.fullmatch(r'torch\.(cuda\.)?\w+Storage', full)
            or (
                module == 'torch'
                and isinstance(getattr(torch, name, None), torch.dtype)
            )
        ):
            self.refused[full] = None
        return Name(full)

    def persistent_load(self, pid: Any) -> StandIn:
        # ('storage', type, key, location, elements[, None])
        if not (
            type(pid) is tuple
            and len(pid) in (5, 6)
            and pid[0] == 'storage'
            and type(pid[1]) is Name
            and type(pid[2]) is str
            and len(pid[2]) <= 32
            and type(pid[4]) is int
            and 0 <= pid[4] < 2**48
            and pid[5:] in ((), (None,))
        ):
            _refuse('describes a storage in a way that torch.save does not')
        return StandIn('storage')

    def check_key(self, key: Any) -> None:
        if type(key) is str or (type(key) is int and abs(key) < LARGE_KEY):
            return
        self.num_odd_keys += 1
        parts = key if type(key) is tuple else (key,)
        # A tuple of tuples could take for ever to hash.
        if (
            self.num_odd_keys > MAX_ODD_KEYS
            or len(parts) > MAX_PARTS
            or any(
                type(part) not in (str, int, float, bool, type(None)) for part in parts
            )
        ):
            _refuse(
                'has keys of dictionaries or members of sets that are '
                'neither text nor ordinary numbers'
            )

    def copy(self, *values: Any) -> int:
        """Counts what is copied; gives its size."""
        size = sum(map(_size, values))
        self.to_copy -= size
        if self.to_copy < 0:
            _refuse(f'copies more than {MAX_COPIES} times what it holds')
        return size

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            _refuse('sets items of something that is no dictionary')
        for key, value in zip(items[::2], items[1::2]):
            self.check_key(key)
            if key in target:
                raise CheckpointFileError(f'holds the key {shown(key, 80)} twice')
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_reduce(self) -> None:
        args, call = self.stack.pop(), self.stack.pop()
        name = getattr(call, 'name', 'a value')
        try:
            if name in SETS:
                for key in args[0] if args else ():
                    self.check_key(key)
            elif type(call) is not Name or not CALLS[name](*args):
                raise TypeError
        # No such call, or another signature.
        except (AttributeError, KeyError, TypeError):
            _refuse(f'calls {shown(name)} in a way that no checkpoint needs')
        size = self.copy(*args)
        if name in CONTAINERS:
            content = args[:1] if name in ('collections.Counter', *MAPPINGS) else ()
            self.append(CONTAINERS[name](*content))
        else:
            self.append(StandIn(name, size))

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        name = getattr(cls, 'name', 'a value')
        if name not in (*CLASSES, *MAPPINGS) or args != ():
            _refuse(f'makes an object of {shown(name)}')
        self.append({} if name in MAPPINGS else StandIn(name))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.copy(state)
        name = getattr(target, 'name', '')
        if isinstance(target, OrderedDict):
            # torch keeps module versions there; other attributes could shadow
            # the methods of the dictionary.
            allowed = isinstance(state, dict) and state.keys() <= {'_metadata'}
        elif name == 'numpy.dtype':
            allowed = _is_dtype_state(state)
        elif name in ARRAY_CALLS:
            allowed = _is_array_state(state)
        else:
            allowed = name in CLASSES and isinstance(state, dict)
        if not allowed:
            _refuse(
                f'sets the state of {shown(name) or "an object"} in a way '
                'that no checkpoint needs'
            )


_DryRun.dispatch.update(
    (code, getattr(_DryRun, pickle._Unpickler.dispatch[code].__name__))
    for code in (getattr(pickle, name)[0] for name in OPCODES)
)


def _refuse(reason: str) -> None:
    raise UnsafeCheckpointError(f'the pickle {reason}')


def check_pickle(data: bytes, start: int = 0) -> int:
    """Runs one pickle of a checkpoint on stand-ins.

    Args:
        data: The bytes of the file or record that holds it.
        start: Where the pickle starts.

    Returns:
        Where it ends.

    Raises:
        UnsafeCheckpointError: It asks for more than tensors, plain containers,
            dates, paths (read as text), ``argparse.Namespace``, NumPy numbers
            and MMEngine's history buffers.
        CheckpointFileError: It is damaged, or holds a key twice.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    run = _DryRun(stream)
    failure = None
    try:
        run.load()
    except Exception as error:  # of any type, where the program is damaged
        failure = error
    if run.refused:
        raise UnsafeCheckpointError(_describe(run.refused))
    if isinstance(failure, (CheckpointFileError, UnsafeCheckpointError)):
        raise failure
    if run.proto != 2:
        raise CheckpointFileError(
            f'its pickle has protocol {run.proto}; torch.save writes 2, and '
            'only that is read'
        )
    if failure is not None:
        raise CheckpointFileError(
            'its pickle is damaged; download or copy the file again '
            f'({type(failure).__name__}: {shown(failure)})'
        ) from failure
    return stream.tell()


def _describe(refused: Iterable[str]) -> str:
    names = [repr(shown(name, 80)) for name in refused]
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return (
        f'the pickle asks for {", ".join(names[:5])}{more}: only tensors, '
        'plain containers, dates, paths, argparse.Namespace, NumPy numbers '
        "and MMEngine's history are read (of a model, save the "
        'state_dict()); nothing was executed'
    )
