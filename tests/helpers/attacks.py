"""Hostile, broken and unusual checkpoints, by construction.

Each generator of :data:`GROUPS` takes a :class:`Source`, a valid checkpoint,
and yields ``(name, bytes)``. Payloads that could act create the file that the
environment variable CANARY names, or delete the folder that VICTIM names.
"""

import argparse
import bz2
import collections
import contextlib
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from safetensors.torch import save as save_safetensors
from torch import Tensor

from repo import at_least

Files = Iterator[tuple[str, bytes]]
Weights = dict[str, Tensor]


def zipped(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def legacy(content: Any) -> bytes:
    return zipped(content, _use_new_zipfile_serialization=False)


def rebuilt(
    data: bytes,
    change: Callable[[str, bytes], bytes | None],
    rename: Callable[[str], str] = lambda name: name,
    **options: Any,
) -> bytes:
    """A torch.save archive, records changed, left out (None) or renamed."""
    target = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(target, 'w', **options) as new,
    ):
        for info in old.infolist():
            content = change(info.filename.partition('/')[2], old.read(info))
            if content is not None:
                new.writestr(rename(info.filename), content)
    return target.getvalue()


class Source(NamedTuple):
    """A valid checkpoint.

    Attributes:
        weights: Of a backbone.
        run: What a training run stores beside, state dict of the whole model
            included; None: the weights lie bare.
    """

    weights: Weights
    run: dict | None = None

    def content(self, weights: Weights | None = None, **extras: Any) -> dict:
        """The checkpoint with other weights of the backbone, or with more."""
        weights = self.weights if weights is None else weights
        if self.run is None:
            return dict(model=weights, **extras) if extras else weights
        rest = {
            key: tensor
            for key, tensor in self.run['state_dict'].items()
            if not key.startswith('backbone.')
        }
        moved = {
            f'backbone.{key}' if isinstance(key, str) else key: value
            for key, value in weights.items()
        }
        return {**self.run, 'state_dict': {**rest, **moved}, **extras}

    def zipped(self, weights: Weights | None = None, **extras: Any) -> bytes:
        return zipped(self.content(weights, **extras))

    def with_pickle(self, program: bytes) -> bytes:
        """An archive whose pickle is ``program``."""
        return rebuilt(
            self.zipped(), lambda name, data: program if name == 'data.pkl' else data
        )

    def safetensors(self) -> bytes:
        content = self.content()
        return save_safetensors(
            {
                key: tensor.clone()
                for key, tensor in content.get('state_dict', content).items()
            }
        )


def truncated(s: Source) -> Files:
    for kind, data in (
        ('zip', s.zipped()),
        ('legacy', legacy(s.content())),
        ('safetensors', s.safetensors()),
    ):
        for part in range(1, 16):
            yield f'{kind}-{part}-of-16', data[: len(data) * part // 16]
        for missing in (1, 7):
            yield f'{kind}-without-last-{missing}', data[:-missing]


def flipped(s: Source) -> Files:
    """Single bits where the format can tell: what zip checksums, names in the
    old format and in safetensors."""
    data = s.zipped()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [info for info in archive.infolist() if info.file_size > 8]
    for i, info in enumerate(infos[:: max(1, len(infos) // 30)]):
        start = (
            info.header_offset
            + 30
            + sum(
                struct.unpack(
                    '<HH', data[info.header_offset + 26 : info.header_offset + 30]
                )
            )
        )
        at = start + info.file_size * (i + 1) // 40
        yield f'zip-{info.filename.partition("/")[2]}', flip(data, at, i % 8)
    for kind, data in (
        ('legacy', legacy(s.content())),
        ('safetensors', s.safetensors()),
    ):
        for i, key in enumerate([k for k in s.weights if 'norm' not in k][:16]):
            yield (f'{kind}-{key}', flip(data, data.index(key.encode()) + 3, i % 5))


def flip(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


def bombs(s: Source) -> Files:
    data = s.zipped()
    for name, method in (
        ('deflate', zipfile.ZIP_DEFLATED),
        ('bzip2', zipfile.ZIP_BZIP2),
        ('lzma', zipfile.ZIP_LZMA),
    ):
        yield (
            f'{name}-50MB-of-zeros',
            rebuilt(
                data,
                lambda name, content: (
                    b'\0' * 50_000_000 if name == 'data/0' else content
                ),
                compression=method,
            ),
        )
    yield (
        'deflated-pickle',
        rebuilt(data, lambda _, content: content, compression=zipfile.ZIP_DEFLATED),
    )
    huge = bytearray(data)
    entry = huge.rindex(b'PK\x01\x02')
    huge[entry + 20 : entry + 28] = struct.pack('<II', 2**31, 2**31)
    yield 'index-declares-2GB', bytes(huge)
    overlap = bytearray(data)
    entries = [i for i in range(len(data)) if data[i : i + 4] == b'PK\x01\x02']
    for entry in entries:  # every name, the same bytes
        overlap[entry + 20 : entry + 28] = struct.pack(
            '<II', len(data) // 2, len(data) // 2
        )
    yield 'overlapping-entries', bytes(overlap)


def other_formats(s: Source) -> Files:
    weights = s.weights
    text = json.dumps(
        {key: tensor.tolist() for key, tensor in list(weights.items())[:2]}
    )
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
        'gzip': gzip.compress(s.zipped()),
        'bzip2': bz2.compress(s.zipped()),
        'xz': lzma.compress(s.zipped()),
        'zstd-magic': b'\x28\xb5\x2f\xfd' + bytes(99),
        'hdf5-magic': b'\x89HDF\r\n\x1a\n' + bytes(99),
        'png-magic': b'\x89PNG\r\n\x1a\n' + bytes(99),
        'elf-magic': b'\x7fELF' + bytes(99),
        'npz': npz.getvalue(),
        'npy': npy.getvalue(),
        'tar': tar.getvalue(),
        'zip-of-text': plain_zip.getvalue(),
        'torchscript': script.getvalue(),
        'wrong-magic-zip': b'PK\x05\x06' + s.zipped()[4:],
        'bytes-after-zip': s.zipped() + b'PK\x05\x06' + bytes(18) + b'!',
    }.items()
    for protocol in range(6):
        yield (
            f'plain-pickle-{protocol}',
            pickle.dumps({key: t.numpy() for key, t in weights.items()}, protocol),
        )
    for i in range(6):
        noise = np.random.default_rng(i).bytes(4000)
        yield f'noise-{i}', noise
        yield f'noise-in-zip-{i}', s.with_pickle(noise)


class Call:
    """Pickles to a call."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def rebuild_tensor(
    weights: Weights, size: Any, stride: Any, offset: int = 0, hooks: Any = None
) -> Call:
    """A tensor as torch pickles it, over the storage of a small one."""
    storage = torch.storage.TypedStorage(
        wrap_storage=weights['norm0.weight'].untyped_storage(),
        dtype=torch.float32,
        _internal=True,
    )
    return Call(
        torch._utils._rebuild_tensor_v2,
        storage,
        offset,
        size,
        stride,
        False,
        hooks or collections.OrderedDict(),
    )


def call_program(module: str, name: str, argument: str) -> bytes:
    """A hand-written pickle, for functions that do not pickle by name."""
    text = argument.encode()
    return (
        b'\x80\x02}X\x01\0\0\0a'
        + f'c{module}\n{name}\n'.encode()
        + b'X'
        + struct.pack('<I', len(text))
        + text
        + b'\x85Rs.'
    )


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
    'torch._utils._import_dotted_name': (
        'torch._utils',
        '_import_dotted_name',
        'os.system',
    ),
    '_rebuild_wrapper_subclass': ('torch._utils', '_rebuild_wrapper_subclass', 'x'),
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
    'dtype of objects': ('numpy', 'dtype', 'O'),
    'path called as a class': ('pathlib', 'Path', '/etc/hostname'),
}


def calls(s: Source) -> Files:
    for name, (module, function, argument) in CALLS.items():
        yield name, s.with_pickle(call_program(module, function, argument))


def containers(s: Source) -> Files:
    """A call with effect in every place that a checkpoint has."""
    evil = Call(os.system, 'touch "$CANARY"')
    weights = s.weights
    buffer = HistoryBuffer([1.0], [1])
    buffer.evil = evil
    array = np.empty(2, object)
    array[0] = evil
    odd = collections.OrderedDict(weights)
    odd.evil = evil
    contents = dict(
        top=evil,
        value=s.content({**weights, 'x': evil}),
        first_value=s.content({'x': evil, **weights}),
        key=s.content({**weights, evil: 1}),
        tuple_key=s.content({**weights, (1, evil): 1}),
        list=s.content({**weights, 'x': [1, [evil]]}),
        tuple=s.content({**weights, 'x': (1, evil)}),
        set=s.content({**weights, 'x': {evil}}),
        frozenset=s.content({**weights, 'x': frozenset([evil])}),
        nested=dict(model=dict(state_dict={**weights, 'x': evil})),
        ordered=collections.OrderedDict(x=evil, **weights),
        ordered_attribute=odd,
        counter=s.content(x=collections.Counter(a=evil)),
        default=s.content(x=collections.defaultdict(list, a=evil)),
        factory=s.content(x=collections.defaultdict(os.getcwd)),
        namespace=s.content(args=argparse.Namespace(lr=evil)),
        history=s.content(hub=dict(loss=buffer)),
        array=s.content(x=array),
        meta=s.content(meta=dict(time=evil)),
        optimizer=s.content(optimizer=dict(state={0: evil}, param_groups=[])),
        groups=s.content(optimizer=dict(state={}, param_groups=[dict(params=[evil])])),
        message_hub=s.content(message_hub=dict(runtime_info=dict(x=evil))),
        hooks=s.content(
            {
                **weights,
                'x': rebuild_tensor(
                    weights, (8,), (1,), hooks=collections.OrderedDict({0: evil})
                ),
            }
        ),
        exception=s.content(x=Call(ValueError, evil)),
        state=s.content(x=_Stateful(evil)),
        date=s.content(x=Call(datetime.date, evil)),
    )
    for name, content in contents.items():
        for kind, save in (
            ('zip', zipped),
            ('legacy', legacy),
            ('protocol-4', lambda c: zipped(c, pickle_protocol=4)),
        ):
            yield f'{name}-{kind}', save(content)


class _Stateful:
    """An object of a class of ours, with state."""

    def __init__(self, value: Any) -> None:
        self.value = value


def orders(s: Source) -> Files:
    """Strings that MMEngine runs, follows or deletes."""
    code = f'x = {PAYLOAD}'
    victim = os.environ.get('VICTIM', 'victim')
    run = s.run or {}
    meta = {**run.get('meta', {}), 'epoch': 0, 'iter': 1}
    hub = run.get('message_hub') or dict(
        log_scalars={}, runtime_info={}, resumed_keys={}
    )

    def in_hub(**infos: Any) -> dict:
        return dict(
            message_hub={
                **hub,
                'runtime_info': {**hub['runtime_info'], **infos},
                'resumed_keys': {**hub['resumed_keys'], **dict.fromkeys(infos, True)},
            }
        )

    for name, extras in dict(
        config=dict(meta={**meta, 'config': code}),
        cfg=dict(meta={**meta, 'cfg': code}),
        both=dict(meta={**meta, 'cfg': code, 'config': code}),
        config_as_dict=dict(meta={**meta, 'config': dict(code=code)}),
        config_path=dict(meta={**meta, 'config': '/etc/hostname'}),
        only_config=dict(meta=dict(config=code)),
        seed=dict(meta={**meta, 'seed': code}),
        epoch=dict(meta={**meta, 'epoch': code, 'iter': code}),
        classes=dict(meta={**meta, 'dataset_meta': dict(classes=code)}),
        old_classes=dict(meta={**meta, 'CLASSES': (code,)}),
        nested_classes=dict(meta={**meta, 'dataset_meta': {'classes': nest(40)}}),
        hub_cfg=in_hub(cfg=code),
        best_file=in_hub(best_ckpt=f'{victim}/file', best_score=-1.0),
        hub_object=dict(
            message_hub=argparse.Namespace(
                _log_scalars={},
                _resumed_keys={},
                _runtime_info=dict(best_ckpt=victim, best_score=-1.0),
            )
        ),
        two_optimizers=dict(
            optimizer=dict(generator=dict(base_param_settings=dict(lr=code)))
        ),
        best_folder=in_hub(best_ckpt=victim, best_score=-1.0),
        keep_ids=in_hub(keep_ckpt_ids=[f'/../../{victim}/file'] * 9),
        keep_other=in_hub(keep_ckpt_ids=victim),
        last=in_hub(last_ckpt=f'{victim}/file'),
        doubling=in_hub(x=nest(40)),
        forged_scalar=in_hub(**{'\x1b[31mFORGED': 1.0}),
        forged_name=dict(meta={**meta, 'experiment_name': '\x1b[31mFORGED\n'}),
    ).items():
        for kind, save in (('zip', zipped), ('legacy', legacy)):
            yield f'{name}-{kind}', save(s.content(**extras))
        # The weights beside them, not in a dictionary of their own.
        content = s.content(**extras)
        weights = content.pop('state_dict', None) or content.pop('model', {})
        yield f'{name}-flat', zipped({**weights, **content})


def nest(depth: int) -> list:
    """A list of 2 ** depth items, made of few."""
    item: list = [1]
    for _ in range(depth):
        item = [item, item]
    return item


def other_runs(s: Source) -> Files:
    """The state of another training run, or of none."""
    run = s.run or dict(meta=dict(epoch=0, iter=1))
    optimizer = run.get('optimizer') or dict(
        state={0: dict(step=torch.ones(1), exp_avg=torch.ones(8))},
        param_groups=[dict(lr=1.0, params=[0])],
    )
    for make in (other_states, other_groups):
        for name, changes in make(optimizer).items():
            yield name, s.zipped(optimizer={**optimizer, **changes})
    for name, extras in other_parts(run).items():
        yield name, s.zipped(**extras)
    yield 'weights-only', zipped(s.weights)
    if s.run is not None:
        yield 'state_dict-only', zipped(dict(state_dict=s.run['state_dict']))


def other_states(optimizer: dict) -> dict[str, dict]:
    """For each parameter."""
    state = optimizer['state']

    def expand(kept: dict) -> dict:
        return {k: t[(0,) * t.dim()].expand(t.shape) for k, t in kept.items()}

    states = {
        name: {index: change(kept) for index, kept in state.items()}
        for name, change in dict[str, Callable[[dict], Any]](
            larger_state=lambda kept: {**kept, 'exp_avg': torch.ones(9)},
            smaller_state=lambda kept: {**kept, 'exp_avg_sq': torch.ones(1, 1)},
            transposed=lambda kept: {
                k: t.mT if t.dim() > 1 else t for k, t in kept.items()
            },
            expanded=expand,
            several_steps=lambda kept: {**kept, 'step': torch.ones(7)},
            no_average=lambda kept: dict(step=torch.ones(1)),
            no_step=lambda kept: {k: t for k, t in kept.items() if k != 'step'},
            text_state=lambda kept: 'x',
            number_state=lambda kept: dict(step=3, exp_avg=4),
        ).items()
    }
    fused = [{**group, 'fused': True} for group in optimizer['param_groups']]
    return {
        **{name: dict(state=state) for name, state in states.items()},
        'expanded_fused': dict(state=states['expanded'], param_groups=fused),
        'swapped': dict(state=dict(zip(state, reversed(list(state.values()))))),
    }


def other_groups(optimizer: dict) -> dict[str, dict]:
    """Of parameters, and what lies beside them."""
    first, *others = optimizer['param_groups']
    return {
        **{
            name: dict(param_groups=[{**first, **options}, *others])
            for name, options in dict(
                nested_lr=dict(lr=nest(45)),
                lr_text=dict(lr='abc'),
                lr_none=dict(lr=None),
                betas=dict(betas='ab'),
                one_beta=dict(betas=(0.9,)),
                no_params=dict(params=[]),
                params=dict(params='x'),
            ).items()
        },
        'no_groups': dict(param_groups=[]),
        'groups': dict(param_groups=3),
        'scaler': dict(loss_scaler='x'),
        'base': dict(base_param_settings='x'),
    }


def other_parts(run: dict) -> dict[str, dict]:
    """Of a run's checkpoint."""
    hub = run.get('message_hub') or {}
    infos = dict(best_score=1j, keep_ckpt_ids=3)
    return dict(
        optimizer=dict(optimizer=3),
        empty=dict(optimizer={}),
        late=dict(meta=dict(epoch=0, iter=10**9)),
        no_meta=dict(meta=None),
        text_meta=dict(meta='x'),
        empty_meta=dict(meta={}),
        epoch_only=dict(meta=dict(epoch=0)),
        negative=dict(meta=dict(epoch=-1, iter=-5)),
        real=dict(meta=dict(epoch=0.5, iter=1.5)),
        hub=dict(message_hub=3),
        no_hub=dict(message_hub=None),
        hub_parts=dict(
            message_hub=dict(log_scalars=3, runtime_info=[], resumed_keys='x')
        ),
        scalars=dict(message_hub={**hub, 'log_scalars': dict(a=3)}),
        complex_info=dict(message_hub={**hub, 'runtime_info': infos}),
        schedulers=dict(param_schedulers=3),
        scheduler_text=dict(param_schedulers=['x']),
        scheduler_keys=dict(param_schedulers=[dict(optimizer=None)]),
        scheduler_type=dict(param_schedulers=[dict(last_step='abc')]),
        scheduler_method=dict(param_schedulers=[dict(_get_value=3)]),
        nested_scheduler=dict(param_schedulers=[dict(last_step=nest(45))]),
        state_dict_number=dict(state_dict=3),
        state_dict_none=dict(state_dict=None),
        state_dict_list=dict(state_dict=[1, 2]),
        state_dict_text=dict(state_dict='weights'),
        ema_number=dict(ema_state_dict=3),
        ema_empty=dict(ema_state_dict={}),
    )


class _DType:
    """Pickles to a NumPy dtype with a state of its own."""

    def __init__(self, state: tuple) -> None:
        self.state = state

    def __reduce__(self):
        return np.dtype, ('i8', False, True), self.state


def huge_shapes(s: Source) -> Files:
    """Files of some kilobytes that ask for terabytes."""
    weights = s.weights
    stem = 'downsample_layers.0.0.weight'

    def tensor(*args: Any) -> Call:
        return rebuild_tensor(weights, *args)

    for name, content in dict(
        expanded=tensor((10**6, 10**6), (0, 0)),
        long=tensor((2**40,), (1,)),
        three_gb=tensor((3 * 2**28,), (1,)),
        offset=tensor((4,), (1,), 2**40),
        stride=tensor((2,), (2**40,)),
        negative=tensor((-1,), (1,)),
        negative_stride=tensor((2,), (-1,)),
        negative_offset=tensor((2,), (1,), -1),
        overflow=tensor((2**62, 4), (1, 1)),
        many_dimensions=tensor((1,) * 64, (1,) * 64),
        ranks_differ=tensor((2, 2), (1,)),
        text_size=tensor(('2',), (1,)),
        array=Call(np.array(0).__reduce__()[0], np.ndarray, (10**12,), b'b'),
        array_of_matrix=Call(np.array(0).__reduce__()[0], np.matrix, (0,), b'b'),
        scalar=Call(np.float64(0).__reduce__()[0], np.dtype('V999999999')),
        big_dtype=Call(np.dtype, 'V999999999999'),
        bytes=Call(bytes, 10**12),
        dtype_flags=_DType((3, '<', None, None, None, -1, -1, 1)),
        dtype_size=_DType((3, '<', None, None, None, 10**9, 1, 0)),
        dtype_fields=_DType(
            (3, '|', None, ('a',), {'a': (np.dtype('i8'), 0)}, 8, 1, 16)
        ),
    ).items():
        yield name, s.zipped({**weights, 'x': content})
        if name in ('expanded', 'long', 'array', 'scalar'):
            yield f'{name}-legacy', legacy(s.content({**weights, 'x': content}))
        if name in ('expanded', 'long', 'three_gb', 'stride'):
            yield f'{name}-used', s.zipped({**weights, stem: content})
    yield (
        'all-expanded',
        s.zipped(
            {
                key: torch.zeros(1).expand([n * 1000 for n in t.shape])
                for key, t in weights.items()
            }
        ),
    )
    yield from huge_storages(s)
    yield from huge_headers()


def huge_storages(s: Source) -> Files:
    old = legacy(s.content())
    # The size of the first storage, BININT1 or BININT2, made a large BININT.
    at = old.index(b'X\x03\0\0\0cpu') + 8
    at += {b'q': 2, b'r': 5}[old[at : at + 1]]  # its number in the memo
    after = at + {b'K': 2, b'M': 3}[old[at : at + 1]]
    yield ('legacy-storage-of-8GB', old[:at] + b'J\xff\xff\xff\x7f' + old[after:])
    yield (
        'zip-storage-of-8GB',
        rebuilt(
            s.zipped(),
            lambda name, data: (
                data.replace(b'K\x08t', b'J\xff\xff\xff\x7ft', 1)
                if name == 'data.pkl'
                else data
            ),
        ),
    )


def headed(header: bytes, length: int | None = None) -> bytes:
    """A safetensors file, its header's length declared."""
    return struct.pack('<Q', len(header) if length is None else length) + header


def huge_headers() -> Files:
    for name, shape, end in (
        ('shape', [2**40], 4 * 2**40),
        ('overflow', [2**62, 2**62], 0),
    ):
        tensor = dict(dtype='F32', shape=shape, data_offsets=[0, end])
        yield f'safetensors-{name}', headed(json.dumps({'x': tensor}).encode())
    yield 'safetensors-header', headed(b'{}' + bytes(99), 2**62)
    yield 'safetensors-deep', headed(b'{' + b'[' * 100_000)


def long_int(value: int) -> bytes:
    data = value.to_bytes(16, 'little')
    return b'\x8a\x10' + data


def text(value: str) -> bytes:
    data = value.encode()
    return b'X' + struct.pack('<I', len(data)) + data


# Integers that Python hashes to the same number.
COLLIDING = [long_int((2**61 - 1) * n) for n in range(20_000)]
# 2 ** 60 steps to hash: t = (t, t), sixty times.
HASHED = b'K\x01' + b'q\x07h\x07\x86' * 60
DEEP_TUPLE = b')' + b'\x85' * 200_000


def hard_to_hash() -> dict[str, bytes]:
    same = b''.join(number + b'N' for number in COLLIDING)
    return {
        'tuple-hash': b'}(' + HASHED + b'K\x01u.',
        'colliding-keys': b'}(' + same + b'u.',
        'colliding-set': b'c__builtin__\nset\n](' + b''.join(COLLIDING) + b'e\x85R.',
        'colliding-counter': b'ccollections\nCounter\n}(' + same + b'u\x85R.',
        'colliding-pairs': b'ccollections\nOrderedDict\n]('
        + b''.join(number + b'N\x86' for number in COLLIDING[:9_000])
        + b'e\x85R.',
        'colliding-tuples': b'}('
        + b''.join(number + b'\x85N' for number in COLLIDING[:9_000])
        + b'u.',
    }


def deep_and_long() -> dict[str, bytes]:
    return {
        'deep-tuple-key': b'}' + DEEP_TUPLE + b'Ns.',
        'deep-tuples': b'}X\x01\0\0\0a' + DEEP_TUPLE + b's.',
        'deep-lists': b']' * 200_000 + b'a' * 199_999 + b'.',
        'deep-dicts': b'}X\x01\0\0\0a' * 100_000 + b'N' + b's' * 100_000 + b'.',
        'many-globals': b''.join(b'cx\n%d\n0' % n for n in range(60_000)) + b'N.',
        'only-marks': b'(' * 300_000,
        'a-million-steps': b'}' + b'K\x010' * 300_000 + b'.',
        'many-storages': b'('
        + b''.join(described(text(f'{n:05d}'), b'K\x00')[:-1] for n in range(9_000))
        + b't.',
    }


def malformed() -> dict[str, bytes]:
    return {
        'no-end': b'}' + b'N' * 1000,
        'no-memo': b'h\x07.',
        'underflow': b'\x87.',
        'huge-string': b'X\xff\xff\xff\xffa.',
        'huge-number': b'\x8b\xff\xff\xff\x7fa.',
        'decimal-number': b'I' + b'9' * 100_000 + b'\n.',
        'extension': b'\x82\x01.',
        'instance': b'(ios\nsystem\n.',
        'persistent-text': b'Pstorage\n.',
        'persistent-call': b'(X\x06\0\0\0modulecos\nsystem\nNNtQ.',
        'name-without-end': b'cos',
        'built-dict': b'}}X\x01\0\0\0aK\x01sb.',
        'built-class': b'ccollections\nOrderedDict\n}X\x05\0\0\0itemsK\x01sb.',
        'shadowed': b'ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.',
        'bytes-of-1TB': b'c__builtin__\nbytearray\n' + long_int(2**40) + b'\x85R.',
    }


def described(key: bytes, count: bytes) -> bytes:
    """A storage as torch describes it."""
    return (
        b'(X\x07\0\0\0storagectorch\nFloatStorage\n'
        + key
        + b'X\x03\0\0\0cpu'
        + count
        + b'tQ.'
    )


def odd_storages() -> dict[str, bytes]:
    zero = text('0')
    return {
        'storage-deep-key': described(DEEP_TUPLE, b'K\x08'),
        'storage-hashed-key': described(HASHED, b'K\x08'),
        'storage-long-key': described(text('x' * 90_000), b'K\x08'),
        'storage-forged-count': described(zero, text('\x1b[31mFORGED\nline')),
        'storage-hashed-count': described(zero, HASHED),
        'storage-negative': described(zero, b'J\xff\xff\xff\xff'),
        'storage-endless': described(zero, long_int(2**100)),
        'long-tuple-key': b'('
        + b'K\x01' * 200_000
        + b'tq\x01('
        + b'}h\x01Ns' * 900
        + b't.',
    }


def copies() -> dict[str, bytes]:
    """A call with one large argument, twenty thousand times."""
    shorts = [b'M' + struct.pack('<H', n) for n in range(30_000)]
    calls_of = {
        'encode': (
            b'c_codecs\nencode\n',
            text('x' * 200_000) + text('latin1') + b'\x86',
        ),
        'path': (b'cpathlib\nPosixPath\n', text('x' * 200_000) + b'\x85'),
        'mapping': (
            b'caddict.addict\nDict\n',
            b'}(' + b''.join(number + b'N' for number in shorts) + b'u\x85',
        ),
        'set': (b'c__builtin__\nset\n', b'](' + b''.join(shorts) + b'e\x85'),
        'size': (b'ctorch\nSize\n', b'(' + b'K\x01' * 90_000 + b't\x85'),
    }
    return {
        f'copied-{name}': call
        + b'q\x01'
        + args
        + b'q\x020]('
        + b'h\x01h\x02R' * 20_000
        + b'e.'
        for name, (call, args) in calls_of.items()
    }


def busy(s: Source) -> Files:
    """Programs that would take for ever, or exhaust the stack."""
    head = legacy({}).partition(b'}q\x00.')[0]
    for make in (hard_to_hash, deep_and_long, malformed, odd_storages, copies):
        for name, program in make().items():
            program = b'\x80\x02' + program
            yield name, s.with_pickle(program)
            if name.startswith(('colliding', 'many', 'deep')):
                yield f'{name}-legacy', head + program
    cycle: dict = {}
    cycle['model'] = cycle
    yield 'cycle', zipped(cycle)
    nested: dict = dict(s.weights)
    for _ in range(50):
        nested = dict(model=nested)
    yield 'fifty-wrappers', zipped(nested)
    yield (
        'fifty-wrappers-beside',
        s.zipped({**s.weights, 'x': nested} if s.run else None, x=nested),
    )
    entries = b','.join(
        b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n
        for n in range(12_000)
    )
    yield 'safetensors-doubled-key', headed(b'{' + entries + b',"k0":{}}')
    yield 'safetensors-digits', headed(b'{"x":' + b'9' * 500_000 + b'}')


def records(s: Source) -> Files:
    """Archives that two readers could read in two ways; storages that are not
    those of the tensors."""
    data = s.zipped()
    yield from added_records(s, data)
    yield from changed_records(data)
    yield 'bytes-before', b'PK\x03\x04' + data
    yield 'with-a-comment', _with_comment(data)
    yield (
        'torchscript-beside',
        with_record(data, 'archive/constants.pkl', b'x', first=False),
    )
    yield from storage_lists(legacy(s.content()))


def with_record(data: bytes, name: str, content: bytes, first: bool) -> bytes:
    """An archive with one more record, before or after the others."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, 'w') as new:
        records = [(info.filename, old.read(info)) for info in old.infolist()]
        records.insert(0 if first else len(records), (name, content))
        for record in records:
            new.writestr(*record)
    return target.getvalue()


def added_records(s: Source, data: bytes) -> Files:
    """Of another checkpoint, under names that some readers take for one."""
    evil = s.zipped({key: tensor + 1 for key, tensor in s.weights.items()})
    with zipfile.ZipFile(io.BytesIO(evil)) as archive:
        other = {
            info.filename.partition('/')[2]: archive.read(info)
            for info in archive.infolist()
        }
    for first in (True, False):
        for name in ('data.pkl', 'data/0', 'byteorder', 'version'):
            for how, place in (
                ('in-capitals', f'archive/{name.upper()}'),
                ('twice', f'archive/{name}'),
                ('in-another-folder', f'other/{name}'),
                ('without-a-folder', name),
            ):
                yield (
                    f'{name}-{how}-{"first" if first else "last"}',
                    with_record(data, place, other[name], first),
                )


def changed_records(data: bytes) -> Files:
    for name in ('data.pkl', 'data/0', 'data/7'):
        yield (
            f'without-{name}',
            rebuilt(data, lambda n, c, name=name: None if n == name else c),
        )
    swap = {'archive/data/0': 'archive/data/1', 'archive/data/1': 'archive/data/0'}
    renames = {
        'in-capitals': str.upper,
        'storages-swapped': lambda n: swap.get(n, n),
        'parent-folder': lambda n: f'../{n}',
    }
    changes = {
        'storage-longer': ('data/0', lambda c: c + bytes(4)),
        'storage-shorter': ('data/0', lambda c: c[:-4]),
        'storage-empty': ('data/0', lambda c: b''),
        'big-endian': ('byteorder', lambda c: b'big'),
    }
    for what, rename in renames.items():
        yield what, rebuilt(data, lambda n, c: c, rename=rename)
    for what, (name, change) in changes.items():
        yield (
            what,
            rebuilt(
                data,
                lambda n, c, name=name, change=change: change(c) if n == name else c,
            ),
        )


def storage_lists(old: bytes) -> Files:
    """The list of storages in a file of torch before 1.6."""
    start, keys = _legacy_keys(old)
    end = start + len(pickle.dumps(keys, 2))
    # The list describes every storage once more, which nothing fills.
    again = b''.join(described(text(key), b'K\x08N')[:-1] + b'0' for key in keys)
    yield 'legacy-keys-describe', old[:start] + b'\x80\x02' + again + old[start + 2 :]
    for name, changed in dict(
        first_omitted=keys[1:],
        last_omitted=keys[:-1],
        none=[],
        doubled=keys + keys[:1],
        unknown=[*keys, '7'],
        moved=keys[::-1],
        tuple=tuple(keys),
        numbers=list(range(len(keys))),
    ).items():
        yield f'legacy-keys-{name}', old[:start] + pickle.dumps(changed, 2) + old[end:]
    for name, count in (('count', 2**40), ('negative-count', -1)):
        yield f'legacy-{name}', old[:end] + struct.pack('<q', count) + old[end + 8 :]


def _with_comment(data: bytes) -> bytes:
    target = io.BytesIO(data)
    with zipfile.ZipFile(target, 'a') as archive:
        archive.comment = b'trained with love'
    return target.getvalue()


def _legacy_keys(data: bytes) -> tuple[int, list]:
    """Where the list of storages starts, and what it holds."""
    stream = io.BytesIO(data)
    for _ in range(3):
        pickle.load(stream)

    class Skip(pickle.Unpickler):
        def find_class(self, *_: Any) -> Any:
            return lambda *args: {}

        def persistent_load(self, pid: Any) -> None:
            return None

    # Stand-ins take no state: look for the list instead.
    with contextlib.suppress(Exception):
        Skip(stream).load()
    for start in range(len(data) - 1, 0, -1):
        if data[start : start + 3] == b'\x80\x02]':
            keys = pickle.loads(data[start:])
            if keys and all(isinstance(key, str) for key in keys):
                return start, keys
    raise AssertionError('no list of storages')


def wrong_content(s: Source) -> Files:
    weights = s.weights
    for key in list(weights)[::5]:
        if not key.startswith('norm'):
            tensor = weights[key]
            rest = {k: t for k, t in weights.items() if k != key}
            doubled = tensor.expand(2, *tensor.shape).clone()
            yield f'without-{key}', s.zipped(rest)
            yield f'integer-{key}', s.zipped({**weights, key: tensor.int()})
            yield f'wrong-rank-{key}', s.zipped({**weights, key: doubled})
    for make in (lacking, other_values, other_parameters):
        for name, changed in make(weights).items():
            yield name, s.zipped(changed)
    for name, prefix in (('wrapped', 'module.'), ('spelt', 'modulex')):
        if s.run is not None:
            state = s.run['state_dict']
            other = {prefix + key: tensor + 1 for key, tensor in state.items()}
            yield (
                f'two-runs-{name}',
                zipped({**s.run, 'state_dict': {**state, **other}}),
            )
    for name, content in other_contents(weights).items():
        yield name, zipped(content)
    yield from doubled_keys(s)


def lacking(weights: Weights) -> dict[str, dict]:
    return {
        name: {key: tensor for key, tensor in weights.items() if part not in key}
        for name, part in dict(
            stage_missing='stages.2',
            block_missing='stages.1.0',
            stem_missing='downsample_layers.0',
            half_a_norm='norm1.bias',
            other_half='norm2.weight',
        ).items()
    }


def other_values(weights: Weights) -> dict[str, dict]:
    """Of one parameter, or of all."""
    key = 'stages.1.1.gamma'
    gamma = weights[key]
    conv, linear = 'stages.0.0.dwconv.weight', 'stages.0.0.pwconv1.weight'
    quantised = torch.quantize_per_tensor(gamma, 0.1, 0, torch.qint8)
    return {
        'none': {},
        'numbered': dict(enumerate(weights.values())),
        'other_network': {'conv1.weight': torch.zeros(3), 'fc.bias': torch.zeros(3)},
        'arrays': {name: tensor.numpy() for name, tensor in weights.items()},
        'lists': {name: tensor.tolist() for name, tensor in weights.items()},
        **{
            name: {**weights, key: value}
            for name, value in dict(
                boolean=gamma > 0,
                complex=gamma.to(torch.complex64),
                no_elements=torch.zeros(0),
                no_dimensions=torch.tensor(1.0),
                quantised=quantised,
                sparse=gamma.to_sparse(),
                meta=gamma.to('meta'),
                wrong_width=torch.zeros(13),
                too_large=gamma.double() + 1e300,
            ).items()
        },
        'wrong_kernel': {**weights, conv: torch.zeros(8, 1, 5, 5)},
        'transposed': {**weights, linear: weights[linear].T.contiguous()},
    }


def other_parameters(weights: Weights) -> dict[str, dict]:
    """More than there should be, or under other names."""
    gamma = 'stages.1.1.gamma'
    torchvision = {
        key.replace('downsample_layers.0', 'features.0').replace(
            'stages.0.', 'features.1.'
        ): tensor
        for key, tensor in weights.items()
        if key.startswith(('downsample_layers.0', 'stages.0'))
    }
    mixed = {
        key.replace('dwconv', 'depthwise_conv') if 'stages.3' in key else key: tensor
        for key, tensor in weights.items()
    }
    twice = {f'module.{key}': tensor for key, tensor in weights.items()}
    grn = torch.zeros(1, 1, 1, 32)
    return dict(
        unknown_inside={**weights, 'stages.0.0.attention.weight': torch.zeros(3)},
        block_number={**weights, 'stages.0.999999.gamma': torch.zeros(8)},
        far_block={**weights, 'stages.0.60.gamma': torch.zeros(8)},
        two_families={**weights, **torchvision},
        doubled={**weights, f'module.{gamma}': weights[gamma]},
        doubled_all={**weights, **twice},
        mixed=mixed,
        grn_and_gamma={**weights, 'stages.0.0.grn.gamma': grn},
    )


def other_contents(weights: Weights) -> dict[str, Any]:
    gamma = 'stages.1.1.gamma'
    return dict(
        two_networks={
            f'{name}.{key}': tensor
            for name in ('student', 'teacher')
            for key, tensor in weights.items()
        },
        no_tensors=dict(model={}, epoch=3),
        list=[weights],
        tensor=weights['downsample_layers.0.0.weight'],
        number=3,
        text='weights',
        nothing=None,
        other_prefix={f'encoder.{key}': tensor for key, tensor in weights.items()},
        nested_wrong=dict(model=dict(encoder=dict(weights))),
        bare={key: tensor for key, tensor in weights.items() if key != gamma},
    )


def doubled_keys(s: Source) -> Files:
    tensors = list(s.weights.values())
    both = save_safetensors({'a': tensors[0], 'b': tensors[0].clone()})
    yield 'key-twice-in-safetensors', both.replace(b'"b"', b'"a"')
    yield (
        'key-twice-in-pickle',
        rebuilt(
            s.zipped({'aaaa': tensors[2], 'bbbb': tensors[3], **s.weights}),
            lambda name, data: (
                data.replace(b'bbbb', b'aaaa') if name == 'data.pkl' else data
            ),
        ),
    )


def names(s: Source) -> Files:
    """Names that would reach a terminal or a log."""
    for name, key in dict(
        colour='\x1b[31mFORGED',
        title='\x1b]0;FORGED\x07',
        line='x\n2026-01-01 - mmengine - INFO - FORGED',
        carriage='x\rFORGED',
        null='x\0FORGED',
        bell='\x07FORGED',
        c1='\x9b31mFORGED',
        surrogate='\ud800FORGED',
        long='x' * 100_000,
        right_to_left='\u202eFORGED',
        empty='',
        dots='...',
        path='../../../etc/passwd',
        spaces='  ',
    ).items():
        yield f'{name}-leftover', s.zipped({**s.weights, key: torch.ones(3)})
        yield (
            f'{name}-inside',
            s.zipped({**s.weights, f'stages.0.0.{key}': torch.ones(3)}),
        )
    yield 'global', s.with_pickle(b'\x80\x02c\x1b[31mFORGED\n\x1b[31mFORGED\n.')


def unusual(s: Source) -> Files:
    """Valid files: they load."""
    weights = s.weights
    gamma = 'stages.1.1.gamma'
    constant = {**weights, gamma: weights[gamma][:1].expand(12)}
    flat = torch.cat([t.flatten() for t in weights.values()])
    sizes = [t.numel() for t in weights.values()]
    views = {
        key: part.view(t.shape)
        for (key, t), part in zip(weights.items(), flat.split(sizes))
    }
    left = dict(fp8=torch.ones(3).to(torch.float8_e4m3fn))
    if at_least('2.10'):  # 2.4 cannot save it
        left['uint16'] = torch.ones(3, dtype=torch.uint16)
    for name, content in dict(
        plain=s.content(),
        views_of_one_buffer=s.content(views),
        parameters=s.content({k: torch.nn.Parameter(t) for k, t in weights.items()}),
        **{
            f'{name}_leftover': s.content({**weights, 'head.x': tensor})
            for name, tensor in left.items()
        },
        double=s.content({k: t.double() for k, t in weights.items()}),
        path=s.content(
            args=argparse.Namespace(
                out=pathlib.Path('/a/b'),
                when=datetime.datetime.now(),
                day=datetime.date.today(),
                took=datetime.timedelta(3),
                zone=datetime.timezone.utc,
            )
        ),
        containers=s.content(
            x=collections.defaultdict(list, a=[1]),
            y={'a', 'b'},
            z=collections.deque([1, 2]),
            w=frozenset([1]),
            v=ConfigDict(a=dict(b=1)),
            u=collections.Counter([1, 1]),
        ),
        large_number=s.content(x=2**70, y={2**70: 1, (1, 'a'): 2}),
        numbers=s.content(
            x=np.float64(3), y=np.arange(3), z=1j, rng=np.random.get_state()[1]
        ),
    ).items():
        yield f'{name}-zip', zipped(content)
        if 'leftover' not in name:  # PyTorch does not write them so
            yield f'{name}-legacy', legacy(content)
    if s.run is None:
        six = weights
        for _ in range(6):
            six = dict(model=six)
        yield 'six-wrappers', zipped(six)
        yield 'expanded', zipped(constant)
    if at_least('2.10'):  # 2.4 cannot leave them out
        yield 'without-checksums', _without_checksums(s.content())
    if s.run is None:
        yield 'safetensors', s.safetensors()


def _without_checksums(content: dict) -> bytes:
    torch.serialization.set_crc32_options(False)
    try:
        return zipped(content)
    finally:
        torch.serialization.set_crc32_options(True)


GROUPS: dict[str, Callable[[Source], Files]] = {
    'truncated files': truncated,
    'flipped bits': flipped,
    'zip bombs': bombs,
    'other formats': other_formats,
    'calls of functions': calls,
    'calls in every container': containers,
    'strings that MMEngine acts on': orders,
    'state of another run': other_runs,
    'huge declared shapes': huge_shapes,
    'programs that keep busy': busy,
    'records moved and missing': records,
    'wrong content': wrong_content,
    'names that forge lines': names,
    'valid and unusual': unusual,
}
# These are refused at every door.
HOSTILE = (
    'truncated files',
    'zip bombs',
    'other formats',
    'calls of functions',
    'calls in every container',
)
# These load at every door that takes what they hold.
VALID = ('valid and unusual',)


def mutate(s: Source, seed: int) -> tuple[str, bytes]:
    """A valid file with a few random changes, and what they are."""
    rng = random.Random(seed)
    kind = rng.choice(['zip', 'legacy', 'safetensors'])
    data = dict(
        zip=s.zipped, legacy=lambda: legacy(s.content()), safetensors=s.safetensors
    )[kind]()
    change = rng.choice(['flip', 'flip', 'cut', 'insert', 'copy', 'records', 'names'])
    if change == 'records' and kind == 'zip':
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            known = [info.filename for info in archive.infolist()]
        a, b = rng.sample(known, 2)
        moves = rng.choice([{a: b}, {a: b, b: a}, {a: a.upper()}, {a: 'x/' + a}])
        return f'{kind}: records {moves}', rebuilt(
            data, lambda _, content: content, rename=lambda name: moves.get(name, name)
        )
    if change == 'names':
        a, b = (key.encode() for key in rng.sample(list(s.weights), 2))
        return f'{kind}: {a} for {b}', rebuilt(
            data,
            lambda name, content: (
                content.replace(a, b) if name == 'data.pkl' else content
            ),
        ) if kind == 'zip' else data.replace(a, b)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        # Half of the time where the structure is.
        at = rng.randrange(
            len(changed) if rng.random() < 0.5 else min(5000, len(changed))
        )
        if rng.random() < 0.2:
            at = len(changed) - 1 - rng.randrange(min(5000, len(changed)))
        if change == 'cut':
            del changed[at : at + rng.choice([1, 4, 100])]
        elif change == 'insert':
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif change == 'copy':
            start = rng.randrange(len(changed))
            changed[at : at + 40] = changed[start : start + 40]
        else:
            changed[at] ^= rng.choice([1, 128, rng.randrange(1, 256)])
    return f'{kind}: {change}', bytes(changed)
