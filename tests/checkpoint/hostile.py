"""Generates hostile and broken checkpoint files: ``name -> bytes``.

Each generator is a group of the table in docs/checkpoints.md. Payloads that
could act create the file named by the environment variable CANARY.
"""
import argparse
import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
from functools import partial
from typing import Any, Callable, Dict, Iterator, Tuple

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save as save_safetensors
from torch import Tensor

Files = Iterator[Tuple[str, bytes]]
Weights = Dict[str, Tensor]


def zipped(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: Any) -> bytes:
    return zipped(content, _use_new_zipfile_serialization=False)


def rebuilt(data: bytes, change: Callable[[str, bytes], bytes],
            **options: Any) -> bytes:
    """A torch.save archive, records changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(
            target, 'w', **options) as new:
        for info in old.infolist():
            name = info.filename.partition('/')[2]
            new.writestr(info.filename, change(name, old.read(info)))
    return target.getvalue()


def with_pickle(weights: Weights, program: bytes) -> bytes:
    """An archive whose pickle is ``program``."""
    return rebuilt(
        zipped(weights), lambda name, data: program
        if name == 'data.pkl' else data)


def truncated(weights: Weights) -> Files:
    for kind, data in (('zip', zipped(weights)), ('legacy', legacy(weights)),
                       ('safetensors', save_safetensors(weights))):
        for part in range(1, 16):
            yield f'{kind}-{part}-of-16', data[:len(data) * part // 16]
        for missing in (1, 7):
            yield f'{kind}-without-last-{missing}', data[:-missing]


def flipped(weights: Weights) -> Files:
    """Single bits where the format can tell: everything that zip checksums, the
    pickles of the old format, the header of safetensors."""
    data = zipped(weights)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if info.file_size > 8]
    for i, info in enumerate(infos[::max(1, len(infos) // 30)]):
        start = data.index(info.filename.encode()) + len(info.filename)
        start += struct.unpack(
            '<H', data[info.header_offset + 28:info.header_offset + 30])[0]
        at = start + (info.file_size * (i + 1)) // 40
        yield f'zip-{info.filename.partition("/")[2]}', flip(data, at, i % 8)
    old = legacy(weights)
    for i, key in enumerate(list(weights)[:16]):
        yield f'legacy-{key}', flip(old, old.index(key.encode()) + 3, i % 5)
    safe = save_safetensors(weights)
    for i, key in enumerate(list(weights)[:16]):
        yield f'safetensors-{key}', flip(safe, safe.index(key.encode()) + 3,
                                         i % 5)


def flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1:]


def bombs(weights: Weights) -> Files:
    data = zipped(weights)
    for name, method in (('deflate', zipfile.ZIP_DEFLATED),
                         ('bzip2', zipfile.ZIP_BZIP2),
                         ('lzma', zipfile.ZIP_LZMA)):
        yield f'{name}-50MB-of-zeros', rebuilt(
            data, lambda name, content: b'\0' * 50_000_000
            if name == 'data/0' else content, compression=method)
    yield 'deflated-pickle', rebuilt(
        data, lambda _, content: content, compression=zipfile.ZIP_DEFLATED)
    huge = bytearray(data)
    entry = huge.rindex(b'PK\x01\x02')
    huge[entry + 20:entry + 28] = struct.pack('<II', 2**31, 2**31)
    yield 'index-declares-2GB', bytes(huge)
    overlap = bytearray(data)
    entries = [i for i in range(len(data)) if data[i:i + 4] == b'PK\x01\x02']
    for entry in entries:  # every name, the same bytes
        overlap[entry + 20:entry + 28] = struct.pack('<II', len(data) // 2,
                                                     len(data) // 2)
    yield 'overlapping-entries', bytes(overlap)


def other_formats(weights: Weights) -> Files:
    text = json.dumps({key: tensor.tolist()
                       for key, tensor in list(weights.items())[:2]})
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    npz, npy, plain_zip = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, **{key: t.numpy() for key, t in weights.items()})
    np.save(npy, np.zeros(9))
    with zipfile.ZipFile(plain_zip, 'w') as archive:
        archive.writestr('folder/readme.txt', 'hello')
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    yield from {
        'empty': b'',
        'one-byte': b'P',
        'zeros': b'\0' * 5000,
        'text': b'these are not weights\n' * 99,
        'html': b'<!DOCTYPE html><html><body>Not found</body></html>',
        'html-after-spaces': b'\n\n  <html><head></head></html>',
        'xml': b'<?xml version="1.0"?><Error>AccessDenied</Error>',
        'json': text.encode(),
        'git-lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:',
        'gzip': gzip.compress(zipped(weights)),
        'bzip2': bz2.compress(zipped(weights)),
        'xz': lzma.compress(zipped(weights)),
        'zstd-magic': b'\x28\xb5\x2f\xfd' + bytes(99),
        'hdf5-magic': b'\x89HDF\r\n\x1a\n' + bytes(99),
        'png-magic': b'\x89PNG\r\n\x1a\n' + bytes(99),
        'elf-magic': b'\x7fELF' + bytes(99),
        'npz': npz.getvalue(),
        'npy': npy.getvalue(),
        'tar': tar.getvalue(),
        'zip-of-text': plain_zip.getvalue(),
        'torchscript': script.getvalue(),
        'wrong-magic-zip': b'PK\x05\x06' + zipped(weights)[4:],
        'bytes-before-zip': b'PK\x03\x04' + zipped(weights),
        'bytes-after-zip': zipped(weights) + b'PK\x05\x06' + bytes(18) + b'!',
    }.items()
    for protocol in range(6):
        yield f'plain-pickle-{protocol}', pickle.dumps(
            {key: t.numpy() for key, t in weights.items()}, protocol)
    for i in range(6):
        noise = np.random.default_rng(i).bytes(4000)
        yield f'noise-{i}', noise
        yield f'noise-in-zip-{i}', with_pickle(weights, noise)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def rebuild_tensor(weights: Weights, size: Any, stride: Any, offset: int = 0,
                   hooks: Any = None) -> Call:
    """A tensor as torch pickles it, over the storage of a small one."""
    storage = torch.storage.TypedStorage(
        wrap_storage=weights['norm0.weight'].untyped_storage(),
        dtype=torch.float32,
        _internal=True)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride,
                False, hooks or collections.OrderedDict())


def call_program(module: str, name: str, argument: str) -> bytes:
    """A hand-written pickle, for functions that do not pickle by name."""
    text = argument.encode()
    return (b'\x80\x02}X\x01\0\0\0a' + f'c{module}\n{name}\n'.encode() + b'X' +
            struct.pack('<I', len(text)) + text + b'\x85Rs.')


PAYLOAD = "open(__import__('os').environ['CANARY'], 'w')"
CALLS = {
    'os.system': ('os', 'system', 'touch "$CANARY"'),
    'posix.system': ('posix', 'system', 'touch "$CANARY"'),
    'nt.system': ('nt', 'system', 'touch "$CANARY"'),
    'eval': ('builtins', 'eval', PAYLOAD),
    'exec': ('builtins', 'exec', PAYLOAD),
    'python2 eval': ('__builtin__', 'eval', PAYLOAD),
    'compile': ('builtins', 'compile', '1'),
    'open': ('builtins', 'open', '/etc/hostname'),
    '__import__': ('builtins', '__import__', 'antigravity'),
    'getattr': ('builtins', 'getattr', 'x'),
    'setattr': ('builtins', 'setattr', 'x'),
    'globals': ('builtins', 'globals', 'x'),
    'import_module': ('importlib', 'import_module', 'antigravity'),
    'Popen': ('subprocess', 'Popen', 'true'),
    'check_output': ('subprocess', 'check_output', 'true'),
    'run_path': ('runpy', 'run_path', '/etc/hostname'),
    'rmtree': ('shutil', 'rmtree', '/nowhere/at/all'),
    'remove': ('os', 'remove', '/nowhere/at/all'),
    'pickle.loads': ('pickle', 'loads', 'cos\nsystem\n'),
    '_pickle.loads': ('_pickle', 'loads', 'cos\nsystem\n'),
    'marshal.loads': ('marshal', 'loads', 'x'),
    'torch.load': ('torch', 'load', '/etc/hostname'),
    'torch.hub.load': ('torch.hub', 'load', 'x/y'),
    '_load_from_bytes': ('torch.storage', '_load_from_bytes', 'x'),
    'torch._utils._import_dotted_name': ('torch._utils', '_import_dotted_name',
                                         'os.system'),
    '_rebuild_wrapper_subclass': ('torch._utils', '_rebuild_wrapper_subclass',
                                  'x'),
    '_rebuild_from_type_v2': ('torch._tensor', '_rebuild_from_type_v2', 'x'),
    'numpy.load': ('numpy', 'load', '/etc/hostname'),
    'attrgetter': ('operator', 'attrgetter', 'x'),
    'methodcaller': ('operator', 'methodcaller', 'system'),
    'partial': ('functools', 'partial', 'x'),
    'copyreg': ('copyreg', '_reconstructor', 'x'),
    'webbrowser': ('webbrowser', 'open', 'http://127.0.0.1:9'),
    'urlopen': ('urllib.request', 'urlopen', 'http://127.0.0.1:9'),
    'socket': ('socket', 'create_connection', 'x'),
    'ctypes': ('ctypes', 'CDLL', 'libc.so.6'),
    'code object': ('types', 'CodeType', 'x'),
    'asyncio': ('asyncio', 'run', 'x'),
    'dotted name': ('os', 'path.os.system', 'touch "$CANARY"'),
    'mmengine': ('mmengine.config', 'Config', 'x'),
    'Counter of text': ('collections', 'Counter', 'x'),
    'Namespace called': ('argparse', 'Namespace', 'x'),
    'rot13': ('_codecs', 'encode', 'x'),
    'decode': ('_codecs', 'decode', 'x'),
    'bytearray': ('builtins', 'bytearray', 'x'),
}


def calls(weights: Weights) -> Files:
    for name, (module, function, argument) in CALLS.items():
        yield name, with_pickle(
            weights, call_program(module, function, argument))


def containers(weights: Weights) -> Files:
    """A call with effect in every place that a checkpoint has."""
    evil = Call(os.system, 'touch "$CANARY"')
    state = collections.OrderedDict(weights)
    buffer = HistoryBuffer([1.], [1])
    buffer.evil = evil
    array = np.empty(2, object)
    array[0] = evil
    hooked = rebuild_tensor(weights, (8, ), (1, ),
                            hooks=collections.OrderedDict({0: evil}))
    odd = collections.OrderedDict(state)
    odd.evil = evil
    contents = dict(
        top=evil,
        value={**weights, 'x': evil},
        first_value={'x': evil, **weights},
        key={**weights, evil: 1},
        tuple_key={**weights, (1, evil): 1},
        list={**weights, 'x': [1, [evil]]},
        tuple={**weights, 'x': (1, evil)},
        set={**weights, 'x': {evil}},
        frozenset={**weights, 'x': frozenset([evil])},
        nested=dict(model=dict(state_dict={**weights, 'x': evil})),
        ordered=collections.OrderedDict(x=evil, **weights),
        ordered_attribute=odd,
        counter=dict(model=weights, x=collections.Counter(a=evil)),
        default=dict(model=weights, x=collections.defaultdict(list, a=evil)),
        namespace=dict(model=weights, args=argparse.Namespace(lr=evil)),
        history=dict(model=weights, hub=dict(loss=buffer)),
        array=dict(model=weights, x=array),
        meta=dict(state_dict=weights, meta=dict(time=evil)),
        optimizer=dict(model=weights, optimizer=dict(
            state={0: evil}, param_groups=[])),
        groups=dict(model=weights, optimizer=dict(
            state={}, param_groups=[dict(params=[evil])])),
        message_hub=dict(state_dict=weights, message_hub=dict(
            runtime_info=dict(x=evil))),
        hooks=dict(weights, x=hooked),
        exception=dict(model=weights, x=Call(ValueError, evil)),
        state=dict(model=weights, x=_Stateful(evil)),
    )
    for name, content in contents.items():
        for kind, save in (('zip', zipped), ('legacy', legacy),
                           ('protocol-4', lambda c: zipped(
                               c, pickle_protocol=4))):
            yield f'{name}-{kind}', save(content)


class _Stateful:
    """An object of a class of ours, with state."""

    def __init__(self, value: Any) -> None:
        self.value = value


def huge_shapes(weights: Weights) -> Files:
    """Files of some kilobytes that ask for terabytes."""
    tensor = partial(rebuild_tensor, weights)
    for name, content in dict(
            expanded=tensor((10**6, 10**6), (0, 0)),
            long=tensor((2**40, ), (1, )),
            offset=tensor((4, ), (1, ), 2**40),
            stride=tensor((2, ), (2**40, )),
            negative=tensor((-1, ), (1, )),
            negative_stride=tensor((2, ), (-1, )),
            negative_offset=tensor((2, ), (1, ), -1),
            overflow=tensor((2**62, 4), (1, 1)),
            many_dimensions=tensor((1, ) * 64, (1, ) * 64),
            ranks_differ=tensor((2, 2), (1, )),
            text_size=tensor(('2', ), (1, )),
            array=Call(np.array(0).__reduce__()[0], np.ndarray, (10**12, ),
                       b'b'),
            array_of_matrix=Call(np.array(0).__reduce__()[0], np.matrix,
                                 (0, ), b'b'),
            scalar=Call(np.float64(0).__reduce__()[0], np.dtype('V999999999')),
            big_dtype=Call(np.dtype, 'V999999999999'),
            bytes=Call(bytes, 10**12),
            meta=torch.empty(10**6, 10**6, device='meta'),
            sparse=torch.sparse_coo_tensor([[0], [0]], [1.], (10**6, 10**6)),
    ).items():
        yield name, zipped({**weights, 'x': content})
        if name in ('expanded', 'long', 'array', 'scalar'):
            yield f'{name}-legacy', legacy({**weights, 'x': content})
    old = legacy(weights)
    # The size of the first storage, BININT1 or BININT2, made a large BININT.
    at = old.index(b'X\x03\0\0\0cpu') + 10
    after = at + {b'K': 2, b'M': 3}[old[at:at + 1]]
    yield ('legacy-storage-of-8GB',
           old[:at] + b'J\xff\xff\xff\x7f' + old[after:])
    yield 'zip-storage-of-8GB', rebuilt(
        zipped(weights), lambda name, data: data.replace(
            b'K\x08t', b'J\xff\xff\xff\x7ft', 1)
        if name == 'data.pkl' else data)
    header = json.dumps({'x': dict(dtype='F32', shape=[2**40],
                                   data_offsets=[0, 4 * 2**40])}).encode()
    yield 'safetensors-shape', struct.pack('<Q', len(header)) + header
    overflow = json.dumps({'x': dict(dtype='F32', shape=[2**62, 2**62],
                                     data_offsets=[0, 0])}).encode()
    yield 'safetensors-overflow', struct.pack('<Q', len(overflow)) + overflow
    yield 'safetensors-header', struct.pack('<Q', 2**62) + b'{}' + bytes(99)
    deep = b'[' * 100_000
    yield 'safetensors-deep', struct.pack('<Q', len(deep) + 1) + b'{' + deep


def busy(weights: Weights) -> Files:
    """Programs that would take for ever, or exhaust the stack."""
    # 2 ** 60 steps to hash: t = (t, t), sixty times, as a key
    tuples = b'\x80\x02}(K\x01q\x00' + b''.join(
        b'q\x00h\x00\x86' for _ in range(60)) + b'K\x01u.'
    yield 'tuple-hash', with_pickle(weights, tuples)
    yield 'deep-tuples', with_pickle(
        weights, b'\x80\x02}X\x01\0\0\0a)' + b'\x85' * 200_000 + b's.')
    yield 'deep-lists', with_pickle(
        weights, b'\x80\x02' + b']' * 200_000 + b'a' * 199_999 + b'.')
    yield 'only-marks', with_pickle(weights, b'\x80\x02' + b'(' * 300_000)
    yield 'four-million-steps', with_pickle(
        weights, b'\x80\x02}' + b'K\x010' * 2_000_000 + b'.')
    yield 'no-end', with_pickle(weights, b'\x80\x02}' + b'N' * 1000)
    yield 'no-memo', with_pickle(weights, b'\x80\x02h\x07.')
    yield 'underflow', with_pickle(weights, b'\x80\x02\x87.')
    yield 'huge-string', with_pickle(weights, b'\x80\x02X\xff\xff\xff\xffa.')
    yield 'huge-number', with_pickle(weights, b'\x80\x02\x8b\xff\xff\xff\x7fa.')
    yield 'decimal-number', with_pickle(
        weights, b'\x80\x02I' + b'9' * 100_000 + b'\n.')
    yield 'extension', with_pickle(weights, b'\x80\x02\x82\x01.')
    yield 'instance', with_pickle(weights, b'\x80\x02(ios\nsystem\n.')
    yield 'persistent-text', with_pickle(weights, b'\x80\x02Pstorage\n.')
    yield 'name-without-end', with_pickle(weights, b'\x80\x02cos')
    cycle = {}
    cycle['model'] = cycle
    yield 'cycle', zipped(cycle)
    nested: dict = dict(weights)
    for _ in range(50):
        nested = dict(model=nested)
    yield 'fifty-wrappers', zipped(nested)


def wrong_content(weights: Weights) -> Files:
    stem = 'downsample_layers.0.0.weight'
    gamma = 'stages.1.1.gamma'

    for key in list(weights)[::5]:
        if not key.startswith('norm'):
            rest = {k: t for k, t in weights.items() if k != key}
            yield f'without-{key}', zipped(rest)
            yield f'integer-{key}', zipped({**weights, key: weights[key].int()})
            yield f'wrong-rank-{key}', zipped(
                {**weights, key: weights[key].expand(2, *weights[key].shape)
                 .clone()})
    contents = dict(
        stage_missing={k: t for k, t in weights.items() if 'stages.2' not in k},
        block_missing={k: t for k, t in weights.items()
                       if 'stages.1.0' not in k},
        stem_missing={k: t for k, t in weights.items()
                      if 'downsample_layers.0' not in k},
        no_tensors=dict(model=dict(), epoch=3),
        empty={},
        list=[weights],
        tensor=weights[stem],
        number=3,
        text='weights',
        none=None,
        numbered=dict(enumerate(weights.values())),
        other_network={'conv1.weight': torch.zeros(3), 'fc.bias':
                       torch.zeros(3)},
        arrays={key: tensor.numpy() for key, tensor in weights.items()},
        lists={key: tensor.tolist() for key, tensor in weights.items()},
        boolean={**weights, gamma: weights[gamma] > 0},
        complex={**weights, gamma: weights[gamma].to(torch.complex64)},
        no_elements={**weights, gamma: torch.zeros(0)},
        no_dimensions={**weights, gamma: torch.tensor(1.)},
        quantised={**weights, gamma: torch.quantize_per_tensor(
            weights[gamma], 0.1, 0, torch.qint8)},
        wrong_width={**weights, gamma: torch.zeros(13)},
        wrong_kernel={**weights, 'stages.0.0.dwconv.weight':
                      torch.zeros(8, 1, 5, 5)},
        transposed={**weights, 'stages.0.0.pwconv1.weight':
                    weights['stages.0.0.pwconv1.weight'].T.contiguous()},
        unknown_inside={**weights, 'stages.0.0.attention.weight':
                        torch.zeros(3)},
        block_number={**weights, 'stages.0.999999.gamma': torch.zeros(8)},
        far_block={**weights, 'stages.0.60.gamma': torch.zeros(8)},
        doubled={**weights, f'module.{gamma}': weights[gamma]},
        doubled_all={**weights, **{f'module.{key}': tensor
                                   for key, tensor in weights.items()}},
        doubled_deep={'model': weights, f'model.{gamma}': weights[gamma]},
        two_networks={f'{name}.{key}': tensor for name in ('student', 'teacher')
                      for key, tensor in weights.items()},
        mixed={**{k: t for k, t in weights.items() if 'stages.3' not in k},
               **{k.replace('dwconv', 'depthwise_conv'): t
                  for k, t in weights.items() if 'stages.3' in k}},
        grn_and_gamma={**weights, 'stages.0.0.grn.gamma':
                       torch.zeros(1, 1, 1, 32)},
    )
    for name, content in contents.items():
        yield name, zipped(content)
    pairs = list(weights.items())
    double = save_safetensors({'a': pairs[0][1], 'b': pairs[0][1].clone()})
    yield 'key-twice-in-safetensors', double.replace(b'"b"', b'"a"')
    same = zipped({'aaaa': pairs[2][1], 'bbbb': pairs[3][1], **weights})
    yield 'key-twice-in-pickle', rebuilt(
        same, lambda name, data: data.replace(b'bbbb', b'aaaa')
        if name == 'data.pkl' else data)


GROUPS: Dict[str, Callable[[Weights], Files]] = {
    'truncated files': truncated,
    'flipped bits': flipped,
    'zip bombs': bombs,
    'other formats': other_formats,
    'calls of functions': calls,
    'calls in every container': containers,
    'huge declared shapes': huge_shapes,
    'programs that keep busy': busy,
    'wrong content': wrong_content,
}
