"""Reads what a checkpoint's pickle would do, without doing any of it.

A pickle is a program for a small stack machine. This module runs that program
on descriptions instead of objects: nothing is imported, called or allocated.
It accepts tensors, plain containers and a few inert types; every call must be
one of :data:`CALLS` with arguments of the kind that a checkpoint has. So sizes
are known to be sane before ``torch.load(weights_only=True)``, which has the
last word, makes the objects.
"""
import pickletools
import re
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Union

from .errors import CheckpointFileError, UnsafeCheckpointError

# Beyond any checkpoint (a Mask R-CNN with its optimizer has about 60,000), so
# that a crafted file cannot keep us busy.
MAX_OPCODES = 3_000_000

HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
HISTORY_METHODS = ('min', 'max', 'current', 'mean')
NAMESPACE = 'argparse.Namespace'
ITEM_SIZES = dict(
    DoubleStorage=8,
    FloatStorage=4,
    HalfStorage=2,
    BFloat16Storage=2,
    LongStorage=8,
    IntStorage=4,
    ShortStorage=2,
    CharStorage=1,
    ByteStorage=1,
    BoolStorage=1,
    ComplexFloatStorage=8,
    ComplexDoubleStorage=16)
DTYPES = frozenset(
    f'torch.{name}' for name in (
        'float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 bool '
        'complex64 complex128').split())
SCALARS = (str, bytes, int, float, bool, type(None))


@dataclass(frozen=True)
class Global:
    """A name that the pickle imports."""
    name: str


@dataclass(frozen=True)
class Storage:
    """The memory of a tensor."""
    num_elements: int


@dataclass(frozen=True)
class Made:
    """What a call gives: ``kind`` is enough to check later uses."""
    kind: str


class SeenDict:
    """A dict: its keys, to find doubled ones."""

    def __init__(self, kind: str = 'dict') -> None:
        self.kind = kind
        self.keys = set()


class SeenList:
    """A list; whether it holds scalars only, so that a set of it is cheap."""

    def __init__(self) -> None:
        self.scalars_only = True


Value = Union[str, bytes, int, float, bool, None, tuple, Global, Storage, Made,
              SeenDict, SeenList]
MARK = object()


def _refuse(reason: str) -> None:
    raise UnsafeCheckpointError(f'the pickle {reason}')


def _require(condition: bool, what: str) -> None:
    if not condition:
        _refuse(f'calls {what} in a way that no checkpoint needs')


def _is_int(value: Value) -> bool:
    return type(value) is int


def _make_tensor(storage: Value,
                 offset: Value,
                 size: Value,
                 stride: Value,
                 *options: Value) -> Made:
    """Checks that a tensor lies within its storage and is no larger."""
    _require(
        isinstance(storage, Storage) and _is_int(offset) and offset >= 0
        and type(size) is tuple and type(stride) is tuple
        and len(size) == len(stride) <= 16
        and all(_is_int(n) and n >= 0 for n in size + stride)
        and len(options) <= 3, 'a tensor constructor')
    count, last = 1, offset
    for n, step in zip(size, stride):
        count *= n
        last += (n - 1) * step
    if count and (count > storage.num_elements
                  or last >= storage.num_elements):
        raise CheckpointFileError(
            f'declares a tensor of shape {size}, {count} elements, in a '
            f'storage of {storage.num_elements}: it is damaged or made to '
            'exhaust memory')
    return Made('tensor')


def _make_parameter(*args: Value) -> Made:
    _require(bool(args) and args[0] == Made('tensor'), 'Parameter')
    return Made('tensor')


def _make_ordered_dict(*args: Value) -> SeenDict:
    _require(not args, 'OrderedDict')
    return SeenDict('OrderedDict')


def _make_counter(*args: Value) -> SeenDict:
    _require(not args or len(args) == 1 and isinstance(args[0], SeenDict),
             'Counter')
    return SeenDict('Counter')


def _make_set(*args: Value) -> Made:
    _require(
        not args or len(args) == 1 and isinstance(args[0], SeenList)
        and args[0].scalars_only, 'set')
    return Made('set')


def _make_bytes(*args: Value) -> Made:
    # Pickle protocol 2 spells bytes as latin-1 text.
    _require(
        len(args) in (0, 2) and all(type(arg) is str for arg in args)
        and args[1:] in ((), ('latin1', )), 'bytes')
    return Made('bytes')


def _make_array(*args: Value) -> Made:
    # NumPy makes an empty array first; shape and data follow as its state.
    _require(len(args) == 3 and args[:2] == (Global('numpy.ndarray'), (0, )),
             'an array constructor')
    return Made('array')


def _make_dtype(*args: Value) -> Made:
    _require(
        bool(args) and type(args[0]) is str
        and re.fullmatch(r'[biufc]\d{1,2}', args[0]) is not None
        and all(type(arg) in (bool, int) for arg in args[1:]),
        'a NumPy dtype')
    return Made('dtype')


def _make_scalar(*args: Value) -> Made:
    _require(
        len(args) == 2 and args[0] == Made('dtype')
        and (args[1] == Made('bytes') or type(args[1]) is bytes),
        'a NumPy scalar')
    return Made('number')


def _make_size(*args: Value) -> tuple:
    _require(
        len(args) == 1 and type(args[0]) is tuple
        and all(_is_int(n) for n in args[0]), 'torch.Size')
    return args[0]


def _make_device(*args: Value) -> Made:
    _require(
        bool(args) and type(args[0]) is str
        and all(_is_int(arg) for arg in args[1:]), 'torch.device')
    return Made('device')


def _get_history_method(*args: Value) -> Made:
    # MMEngine stores the methods of its history buffers beside their values.
    # The reader answers this with a function of its own, never with getattr.
    if not (len(args) == 2 and args[0] == Global(HISTORY_BUFFER)
            and args[1] in HISTORY_METHODS):
        _refuse("calls 'getattr' on something other than MMEngine's history "
                'buffer')
    return Made('method')


CALLS: Dict[str, Callable[..., Value]] = {
    'torch._utils._rebuild_tensor': _make_tensor,
    'torch._utils._rebuild_tensor_v2': _make_tensor,
    'torch._utils._rebuild_parameter': _make_parameter,
    'torch.Size': _make_size,
    'torch.device': _make_device,
    'collections.OrderedDict': _make_ordered_dict,
    'collections.Counter': _make_counter,
    'builtins.set': _make_set,
    'builtins.getattr': _get_history_method,
    '_codecs.encode': _make_bytes,
    'builtins.bytes': _make_bytes,
    'numpy.dtype': _make_dtype,
    **{
        f'numpy.{core}.multiarray.{name}': function
        for core in ('core', '_core') for name, function in (
            ('_reconstruct', _make_array), ('scalar', _make_scalar))
    },
}
CLASSES = (NAMESPACE, HISTORY_BUFFER)
STORAGES = {
    f'torch.{device}{name}': size
    for name, size in ITEM_SIZES.items() for device in ('', 'cuda.')
}
ALLOWED = {*CALLS, *CLASSES, *STORAGES, *DTYPES, 'numpy.ndarray'}


class StorageSizes:
    """Bytes of each storage in the file; all of them together for the format
    of torch before 1.6, which has no index.

    Args:
        records: Size by key, or None.
        total: Bytes in the file.
    """

    def __init__(self, records: Optional[Dict[str, int]], total: int) -> None:
        self.records = records
        self.left = total
        self.seen: Dict[str, int] = {}

    def claim(self, key: str, num_bytes: int) -> None:
        """Checks the declared size of a storage, before it is allocated."""
        if self.seen.setdefault(key, num_bytes) != num_bytes:
            raise CheckpointFileError(
                f'declares storage {key!r} with two sizes: it is damaged')
        if self.records is None:
            self.left -= num_bytes
            fits = self.left >= 0
        else:
            fits = self.records.get(key) == num_bytes
        if not fits:
            raise CheckpointFileError(
                f'declares {num_bytes} bytes for storage {key!r}, which the '
                'file does not have: it is truncated, damaged or made to '
                'exhaust memory')


def scan_pickle(data: bytes, storages: StorageSizes, start: int = 0) -> int:
    """Checks one pickle of a checkpoint.

    Args:
        data: The bytes of the file or record that holds it.
        storages: What the file has for tensors.
        start: Where the pickle starts.

    Returns:
        Where it ends.

    Raises:
        UnsafeCheckpointError: It needs a type or a call that is not allowed.
        CheckpointFileError: It is damaged, or declares more than the file has.
    """
    stream = _Stream(data, start)
    try:
        _check_names(stream)
        stream.seek(start)
        _Machine(storages).run(stream)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError,
            ValueError) as error:
        if isinstance(error, (CheckpointFileError, UnsafeCheckpointError)):
            raise
        raise CheckpointFileError(
            f'its pickle is damaged; download or copy the file again '
            f'({type(error).__name__}: {error})'
        ) from error
    return stream.tell()


class _Stream:
    """Reads ``data`` as pickletools asks; copies only what is asked for."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def read(self, size: int) -> bytes:
        chunk = bytes(self.data[self.position:self.position + size])
        self.position += len(chunk)
        return chunk

    def readline(self) -> bytes:
        end = self.data.find(b'\n', self.position)
        return self.read((len(self.data) if end < 0 else end + 1) -
                         self.position)

    def seek(self, position: int) -> None:
        self.position = position

    def tell(self) -> int:
        return self.position


def _normalise(module: str, name: str) -> str:
    module = {'__builtin__': 'builtins'}.get(module, module)
    return f'{module}.{name}'


def _check_names(stream: _Stream) -> None:
    """Refuses, by name, everything the pickle imports beyond the list."""
    refused, strings = [], []
    protocol = 2
    for count, (op, arg, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise CheckpointFileError(
                f'its pickle has more than {MAX_OPCODES} instructions, more '
                'than any checkpoint needs')
        name = None
        if op.name in ('GLOBAL', 'INST'):
            name = _normalise(*arg.split(' ', 1))
        elif op.name == 'STACK_GLOBAL':
            # Its two operands may lie anywhere; the last two strings are right
            # for every ordinary pickle and name a suspect in the others.
            name = _normalise(*(strings[-2:] if len(strings) > 1 else
                                ('', 'unnamed')))
        elif op.name.startswith('EXT'):
            name = f'extension {arg}'
        elif 'UNICODE' in op.name or op.name in ('STRING', 'BINSTRING'):
            strings = [*strings[-1:], arg[:200]]
        elif op.name == 'PROTO':
            protocol = arg
        if name is not None and name not in ALLOWED and name not in refused:
            refused.append(name)
    if refused:
        shown = ', '.join(repr(name[:80]) for name in refused[:5])
        more = f' and {len(refused) - 5} more' if len(refused) > 5 else ''
        _refuse(f'asks for {shown}{more}: only tensors, plain containers, '
                'argparse.Namespace, NumPy numbers and MMEngine history are '
                'read, nothing was executed')
    if protocol != 2:
        raise CheckpointFileError(
            f'its pickle has protocol {protocol}; torch.save writes 2, and '
            'only that is read')


class _Machine:
    """The stack machine of pickle protocol 2, on descriptions."""

    def __init__(self, storages: StorageSizes) -> None:
        self.storages = storages
        self.stack: List[Value] = []
        self.memo: Dict[int, Value] = {}

    def run(self, stream: _Stream) -> None:
        for op, arg, _ in pickletools.genops(stream):
            if op.name in _PUSHED:
                self.stack.append(_PUSHED[op.name](arg))
            elif op.name in ('BINGET', 'LONG_BINGET'):
                self.stack.append(self.memo[arg])
            elif op.name in ('BINPUT', 'LONG_BINPUT'):
                self.memo[arg] = self.stack[-1]
            elif op.name in ('PROTO', 'STOP'):
                continue
            elif op.name in _STEPS:
                _STEPS[op.name](self)
            else:
                _refuse(f'uses the instruction {op.name}, which torch.save '
                        'does not write')

    def _pop_to_mark(self) -> List[Value]:
        at = len(self.stack) - 1
        while self.stack[at] is not MARK:
            at -= 1
            if at < 0:
                raise IndexError('no mark')
        items = self.stack[at + 1:]
        del self.stack[at:]
        return items

    def _make_tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) < length:
            raise IndexError('stack underflow')
        del self.stack[-length:]
        self.stack.append(items)

    def _append(self, items: List[Value]) -> None:
        target = self.stack[-1]
        if not isinstance(target, SeenList):
            _refuse('appends to something that is not a list')
        target.scalars_only &= all(type(item) in SCALARS for item in items)

    def _set_items(self, items: List[Value]) -> None:
        target = self.stack[-1]
        if not isinstance(target, SeenDict):
            _refuse('sets items of something that is not a dict')
        for key in items[::2]:
            # A nested tuple could take for ever to hash.
            if not (type(key) in SCALARS or type(key) is tuple
                    and all(type(part) in SCALARS for part in key)):
                _refuse('has a dict key that is neither text nor a number')
            if key in target.keys:
                raise CheckpointFileError(f'holds the key {key!r} twice')
            target.keys.add(key)

    def _call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.name not in CALLS:
            _refuse(f'calls {getattr(function, "name", "a value")!r}')
        _require(type(args) is tuple, function.name)
        self.stack.append(CALLS[function.name](*args))

    def _new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Global) or cls.name not in CLASSES or args != ():
            _refuse(f'creates {getattr(cls, "name", "a value")!r}')
        self.stack.append(Made(cls.name))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Made) and target.kind in CLASSES:
            allowed = isinstance(state, SeenDict)
        elif isinstance(target, SeenDict):
            # torch keeps module versions there; other attributes could shadow
            # the methods of the dict.
            allowed = (
                target.kind == 'OrderedDict' and isinstance(state, SeenDict)
                and state.keys <= {'_metadata'})
        elif target == Made('dtype'):
            # (version, byte order, no sub-array, fields or names, ...)
            allowed = type(state) is tuple and state[2:5] == (None, ) * 3
        else:
            # (version, shape, dtype, order, data)
            allowed = (
                target == Made('array') and type(state) is tuple
                and len(state) == 5 and state[2] == Made('dtype')
                and (state[4] == Made('bytes') or type(state[4]) is bytes))
        if not allowed:
            _refuse('sets the state of something other than a history buffer, '
                    'a namespace or an array')

    def _load_storage(self) -> None:
        pid = self.stack.pop()
        _require(
            type(pid) is tuple and len(pid) in (5, 6) and pid[0] == 'storage'
            and isinstance(pid[1], Global) and pid[1].name in STORAGES
            and type(pid[2]) is str and _is_int(pid[4]) and pid[4] >= 0
            and pid[5:] in ((), (None, )), 'a tensor storage')
        _, storage_type, key, _, num_elements, *_ = pid
        self.storages.claim(key, num_elements * STORAGES[storage_type.name])
        self.stack.append(Storage(num_elements))


_PUSHED: Dict[str, Callable] = {
    'MARK': lambda _: MARK,
    'NONE': lambda _: None,
    'NEWTRUE': lambda _: True,
    'NEWFALSE': lambda _: False,
    'EMPTY_TUPLE': lambda _: (),
    'EMPTY_LIST': lambda _: SeenList(),
    'EMPTY_DICT': lambda _: SeenDict(),
    'EMPTY_SET': lambda _: Made('set'),
    'GLOBAL': lambda arg: Global(_normalise(*arg.split(' ', 1))),
    **dict.fromkeys(('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT',
                     'BINUNICODE', 'SHORT_BINSTRING'), lambda arg: arg),
}
_STEPS: Dict[str, Callable[[_Machine], None]] = {
    'TUPLE': lambda m: m.stack.append(tuple(m._pop_to_mark())),
    'TUPLE1': lambda m: m._make_tuple(1),
    'TUPLE2': lambda m: m._make_tuple(2),
    'TUPLE3': lambda m: m._make_tuple(3),
    'APPEND': lambda m: m._append([m.stack.pop()]),
    'APPENDS': lambda m: m._append(m._pop_to_mark()),
    'SETITEM': lambda m: m._set_items([m.stack.pop(-2), m.stack.pop()]),
    'SETITEMS': lambda m: m._set_items(m._pop_to_mark()),
    'REDUCE': _Machine._call,
    'NEWOBJ': _Machine._new_object,
    'BUILD': _Machine._build,
    'BINPERSID': _Machine._load_storage,
}
