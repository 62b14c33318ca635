"""Reading runs no code, whatever the file; and reads what training wrote."""

import argparse
import collections
import os
import pickle
import socket
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import attacks
from convnext_mm import CheckpointError, load_checkpoint
from convnext_mm.checkpoint import (
    CheckpointFileError,
    UnsafeCheckpointError,
    read_checkpoint,
)
from convnext_mm.checkpoint.reader import TRUST_VARIABLE


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A path that a payload creates if it runs."""
    path = tmp_path / 'canary'
    monkeypatch.setenv('CANARY', str(path))
    return path


@pytest.mark.slow
@pytest.mark.parametrize('group', attacks.HOSTILE)
def test_messages_name_the_file(group, weights, tmp_path, canary):
    path = tmp_path / 'hostile.pth'
    for name, data in attacks.GROUPS[group](attacks.Source(weights)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert not canary.exists(), f'{name} was executed'
        message = str(error.value)
        assert str(path) in message and len(message) > len(str(path)) + 12
        assert message.isprintable()


def test_payloads_would_act(weights, tmp_path, canary):
    """The control: without protection the same files do run code."""
    path = tmp_path / 'hostile.pth'
    source = attacks.Source(weights)
    path.write_bytes(dict(attacks.containers(source))['value-zip'])
    torch.load(path, weights_only=False)
    assert canary.exists()
    canary.unlink()
    path.write_bytes(dict(attacks.calls(source))['eval'])
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_what_is_refused_is_named(weights, tmp_path):
    path = tmp_path / 'hostile.pth'
    path.write_bytes(dict(attacks.calls(attacks.Source(weights)))['os.system'])
    with pytest.raises(
        UnsafeCheckpointError, match="asks for 'os.system'.*nothing was executed"
    ):
        read_checkpoint(path)


def special_files(folder):
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / 'pipe')
    os.symlink(folder / 'nowhere', folder / 'broken link')
    os.symlink('loop', folder / 'loop')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / 'socket'))
    return {
        'missing': folder / 'missing.pth',
        'directory': folder,
        'pipe': folder / 'pipe',
        'broken link': folder / 'broken link',
        'link to itself': folder / 'loop',
        'socket': folder / 'socket',
        'device': '/dev/zero',
        'null device': '/dev/null',
        'name with zero byte': folder / 'a\0b',
        'long name': folder / ('a' * 300),
        'below a file': __file__ + '/x.pth',
        'empty name': '',
    }


def test_special_files(tmp_path):
    for path in special_files(tmp_path).values():
        with pytest.raises(CheckpointFileError):
            load_checkpoint(path)


def test_no_permission(tmp_path, weights, monkeypatch):
    path = tmp_path / 'weights.pth'
    torch.save(weights, path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(*args):
            raise PermissionError(13, 'Permission denied')

        monkeypatch.setattr('os.open', refuse)
    with pytest.raises(CheckpointFileError, match='permissions'):
        load_checkpoint(path)


@pytest.fixture
def run_state(weights):
    """What MMEngine, the paper's code and people store beside weights."""
    buffer = HistoryBuffer([1.0, 2.0, 3.0], [1, 1, 1])
    return dict(
        state_dict=collections.OrderedDict(weights),
        message_hub=dict(
            log_scalars=collections.OrderedDict(loss=buffer, empty=HistoryBuffer())
        ),
        optimizer=dict(
            state={0: dict(step=torch.tensor(3.0), exp_avg=torch.ones(2))},
            param_groups=[dict(lr=1e-3, betas=(0.9, 0.999), params=[0])],
        ),
        param_schedulers=[dict(milestones=collections.Counter([8, 11]), last_step=3)],
        args=argparse.Namespace(model='tiny', lr=1e-3, names=['a', None]),
        meta=dict(
            classes={'cat', 'dog'},
            device=torch.device('cpu'),
            dtype=torch.float16,
            size=torch.Size([2, 3]),
            best=np.float64(0.5),
            count=np.int32(7),
            palette=np.arange(6, dtype=np.uint8).reshape(2, 3),
            flags=np.array([True, False]),
            blob=b'\0\xff',
            big=2**70,
            parameter=torch.nn.Parameter(torch.ones(2)),
        ),
    )


@pytest.mark.parametrize('zipped', [True, False])
def test_state_of_a_run_is_read(zipped, run_state, tmp_path):
    path = tmp_path / 'run.pth'
    torch.save(run_state, path, _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(path)
    assert content['args'] == run_state['args']
    assert content['param_schedulers'] == run_state['param_schedulers']
    assert (
        content['optimizer']['param_groups'] == run_state['optimizer']['param_groups']
    )
    meta = content['meta']
    assert meta['classes'] == {'cat', 'dog'} and meta['big'] == 2**70
    assert np.array_equal(meta['palette'], run_state['meta']['palette'])
    assert (meta['best'], meta['count']) == (0.5, 7)
    buffer = content['message_hub']['log_scalars']['loss']
    assert type(buffer) is HistoryBuffer
    assert buffer.mean() == 2 and buffer.statistics('max') == 3
    assert all(
        torch.equal(tensor, run_state['state_dict'][key])
        for key, tensor in content['state_dict'].items()
    )


def test_statistics_of_a_file_do_not_replace_mmengines(tmp_path):
    buffer = HistoryBuffer([1.0], [1])
    before = dict(HistoryBuffer._statistics_methods)
    buffer._statistics_methods = dict(min=torch.device('cpu'), evil=3)
    torch.save(dict(x=buffer), tmp_path / 'run.pth')
    loaded = read_checkpoint(tmp_path / 'run.pth')['x']
    assert HistoryBuffer._statistics_methods == before
    assert loaded.statistics('min') == 1


def test_lists_of_other_libraries_do_not_count(weights, tmp_path, canary):
    path = tmp_path / 'hostile.pth'
    path.write_bytes(dict(attacks.calls(attacks.Source(weights)))['getattr'])
    torch.serialization.add_safe_globals([getattr, eval])
    try:
        with pytest.raises(UnsafeCheckpointError):
            read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) >= {getattr, eval}
    finally:
        torch.serialization.clear_safe_globals()


def test_old_torch_refuses_pickles_but_reads_safetensors(
    weights, tmp_path, monkeypatch
):
    from safetensors.torch import save_file

    monkeypatch.setattr(torch, '__version__', '2.9.1')
    torch.save(weights, tmp_path / 'a.pth')
    save_file(weights, tmp_path / 'b.safetensors')
    with pytest.raises(UnsafeCheckpointError, match=f'2.9.1 cannot.*{TRUST_VARIABLE}'):
        load_checkpoint(tmp_path / 'a.pth')
    assert load_checkpoint(tmp_path / 'b.safetensors').keys() == weights.keys()
    assert load_checkpoint(tmp_path / 'a.pth', trust_pickle=True)


def test_torch_without_its_unpickler_refuses_pickles(weights, tmp_path, monkeypatch):
    """Never another way of reading them."""
    torch.save(weights, tmp_path / 'a.pth')
    monkeypatch.setitem(sys.modules, 'torch._weights_only_unpickler', None)
    with pytest.raises(UnsafeCheckpointError, match='safetensors'):
        load_checkpoint(tmp_path / 'a.pth')


def test_vouching_is_for_one_file(weights, tmp_path, canary, monkeypatch):
    data = dict(attacks.containers(attacks.Source(weights)))['value-zip']
    for name in ('mine.pth', 'other.pth'):
        (tmp_path / name).write_bytes(data)
    monkeypatch.setenv(TRUST_VARIABLE, str(tmp_path / 'mine.pth'))
    with pytest.raises(UnsafeCheckpointError):
        read_checkpoint(tmp_path / 'other.pth')
    assert not canary.exists()
    read_checkpoint(tmp_path / 'mine.pth')
    assert canary.exists()


def test_checksums_may_be_absent(weights, tmp_path):
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('PyTorch below 2.6 cannot leave them out')
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / 'a.pth').keys() == weights.keys()


def test_pickled_arrays_of_objects_are_refused(tmp_path):
    torch.save(dict(x=np.array([None, 'a'], object)), tmp_path / 'a.pth')
    with pytest.raises(UnsafeCheckpointError, match='numpy.dtype'):
        read_checkpoint(tmp_path / 'a.pth')


def test_sample_run_has_its_message_hub(shared_dir):
    content = read_checkpoint(
        shared_dir / 'reference' / 'checkpoints' / 'mmengine_runner.pth'
    )
    from mmengine.logging import MessageHub

    hub = MessageHub('sample')
    hub.load_state_dict(content['message_hub'])
    assert hub.get_scalar('train/loss').data[0].tolist() == [0, 1, 2, 3, 4]
    assert hub.get_info('iter') == 5


def test_plain_pickle_is_not_mistaken(tmp_path):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps({'a': 1}, 2))
    with pytest.raises(CheckpointFileError, match='torch.save did not write'):
        read_checkpoint(tmp_path / 'a.pkl')
