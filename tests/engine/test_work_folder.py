"""Work folders: which checkpoint is the newest, who owns a folder, what is refused."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from convnext_mm.checkpoint import (
    CheckpointFileError,
    CheckpointMismatchError,
    read_checkpoint,
)
from convnext_mm.checkpoint.errors import CheckpointWriteError
from convnext_mm.checkpoint.write import BackgroundWriter, write_checkpoint
from convnext_mm.engine import network, supervision
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.hooks import checkpoint_hook
from convnext_mm.engine.work_folder import (
    check_newest,
    check_unused,
    checkpoints,
    clear,
    locked,
    newest_valid,
)
from repo import ROOT
from toy_runs import Fault, Killed, kill, make, same, weights

CONTENT = dict(meta={}, state_dict=dict(weight=torch.arange(1000.0)))


def names(folder):
    return [path.name for path in checkpoints(folder)]


def touch(folder, *files):
    for file in files:
        write_checkpoint(CONTENT, folder / file)


def test_order(tmp_path):
    touch(tmp_path, 'iter_9.pth', 'iter_10.pth', 'autosave_iter_11.pth', 'best_x.pth')
    assert names(tmp_path) == ['autosave_iter_11.pth', 'iter_10.pth', 'iter_9.pth']
    for path in tmp_path.glob('*.pth'):
        path.unlink()
    touch(tmp_path, 'epoch_2.pth', 'epoch_10.pth', 'autosave_epoch_2_iter_99.pth')
    assert names(tmp_path) == [
        'epoch_10.pth',
        'autosave_epoch_2_iter_99.pth',
        'epoch_2.pth',
    ]


def test_newest_valid(tmp_path):
    assert newest_valid(tmp_path) is None
    touch(tmp_path, 'iter_1.pth', 'iter_2.pth', 'iter_3.pth')
    os.truncate(tmp_path / 'iter_3.pth', 1000)
    (tmp_path / 'iter_2.pth').write_bytes(b'')
    assert newest_valid(tmp_path).name == 'iter_1.pth'
    os.truncate(tmp_path / 'iter_1.pth', 10)
    with pytest.raises(CheckpointFileError, match='of 3 checkpoints none.*--overwrite'):
        newest_valid(tmp_path)


def test_names_of_the_users_own(tmp_path):
    """Only the pointer tells which of them is the newest."""
    touch(tmp_path, 'ckpt_8.pth', 'ckpt_12.pth', 'autosave_iter_7.pth')
    pointed = str(tmp_path / 'ckpt_12.pth')
    (tmp_path / 'last_checkpoint').write_text(pointed)
    assert newest_valid(tmp_path).name == 'ckpt_12.pth'
    with pytest.raises(ConfigError, match='ckpt_12.pth'):
        check_unused(tmp_path)
    os.truncate(pointed, 100)
    assert newest_valid(tmp_path).name == 'autosave_iter_7.pth'
    os.unlink(pointed)
    assert newest_valid(tmp_path).name == 'autosave_iter_7.pth'
    touch(tmp_path, 'iter_9.pth')
    (tmp_path / 'last_checkpoint').write_text('autosave_iter_7.pth')  # behind the last
    assert newest_valid(tmp_path).name == 'iter_9.pth'
    touch(tmp_path, 'ckpt_12.pth')
    (tmp_path / 'last_checkpoint').write_text('ckpt_12.pth')
    with pytest.raises(ConfigError, match='load_from=.*ckpt_12.pth.*move it'):
        clear(tmp_path, needed=pointed)
    copied = tmp_path / 'copied'
    copied.mkdir()
    (copied / 'last_checkpoint').write_text(pointed)
    clear(copied)
    assert os.path.exists(pointed) and not list(copied.iterdir())
    clear(tmp_path)
    assert not list(tmp_path.glob('*_1*')) and not list(tmp_path.glob('last_*'))


@pytest.mark.parametrize(
    'job, count, another',
    [
        ('SLURM_JOB_ID', 'SLURM_RESTART_COUNT', '8'),
        ('TORCHELASTIC_RUN_ID', 'TORCHELASTIC_RESTART_COUNT', 'another'),
    ],
)
def test_restart_is_of_the_same_run(job, count, another, tmp_path, monkeypatch):
    """What was started again, and never had the folder, does not take it."""
    folder = str(tmp_path)
    monkeypatch.setenv(job, '7')
    monkeypatch.setenv(count, '0')
    assert not supervision.is_restart(folder)
    monkeypatch.setenv(count, '1')
    assert not supervision.is_restart(folder)
    supervision.mark_started(folder)
    assert supervision.is_restart(folder)
    monkeypatch.setenv(job, another)
    assert not supervision.is_restart(folder)


def test_used_folder_is_refused_and_cleared(tmp_path):
    check_unused(tmp_path)
    touch(tmp_path, 'iter_8.pth', 'iter_16.pth', 'best_mIoU_iter_8.pth', 'mine.pth')
    with pytest.raises(ConfigError, match='iter_16.pth.*--resume.*--overwrite'):
        check_unused(tmp_path)
    check_newest(tmp_path / 'iter_16.pth', tmp_path)
    with pytest.raises(ConfigError, match='iter_16.pth.*iter_8.pth'):
        check_newest(tmp_path / 'iter_8.pth', tmp_path)
    with pytest.raises(ConfigError, match=r'iter_16.pth'):
        check_newest(tmp_path.parent / 'iter_99.pth', tmp_path)
    clear(tmp_path, keep=tmp_path / 'iter_8.pth')
    assert names(tmp_path) == ['iter_8.pth']
    clear(tmp_path)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['mine.pth']


def hold(folder, ready):
    with locked(folder):
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize(
    'message, mendable',
    [
        ('Timed out waiting 3000ms for recv operation to complete', True),
        ('Application timeout caused pair closure', True),
        ('mat1 and mat2 shapes cannot be multiplied', False),
    ],
)
def test_faults_of_others_are_mendable(message, mendable):
    assert supervision.is_mendable(RuntimeError(message)) is mendable


def test_process_ends_whose_launcher_is_gone(tmp_path):
    """Also where it went before the process had started."""
    gone = subprocess.Popen(['true'])
    gone.wait()
    (tmp_path / supervision.LAUNCHER).write_text(str(gone.pid))
    code = (
        'import time; from convnext_mm.engine import supervision; '
        'supervision.announce(); time.sleep(60)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**os.environ, supervision.FOLDER: str(tmp_path), 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == -signal.SIGTERM


def test_address_that_only_this_machine_knows(monkeypatch):
    assert network.own_address('127.0.0.1') == '127.0.0.1'
    assert network.interface_of('127.0.0.1') == 'lo'
    # As many have for their own name in /etc/hosts.
    assert network.own_address('127.0.1.1') == '127.0.0.1'
    connect = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, 'connect', lambda probe, _: connect(probe, ('127.0.1.1', 9))
    )
    assert network.own_address('node0') is None


def test_lock(tmp_path):
    """A second process is kept out; a dead one's lock is not."""
    context = multiprocessing.get_context('fork')
    ready = context.Event()
    owner = context.Process(target=hold, args=(tmp_path, ready))
    owner.start()
    assert ready.wait(30)
    with (
        pytest.raises(ConfigError, match=f'under way.*process {owner.pid}'),
        locked(tmp_path),
    ):
        pass
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    (tmp_path / '.iter_8.pth.1.part').touch()
    with locked(tmp_path):
        assert not (tmp_path / '.iter_8.pth.1.part').exists()


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / 'iter_8.pth'
    write_checkpoint(CONTENT, path)
    before = path.read_bytes()

    def tear(content, file):
        file.write(b'torn')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(torch, 'save', tear)
        with pytest.raises(CheckpointWriteError, match='No space left'):
            write_checkpoint(CONTENT, path)
        patch.setattr(torch, 'save', lambda content, file: file.write(b'torn'))
        with pytest.raises(CheckpointWriteError):
            write_checkpoint(CONTENT, path)
        patch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(CheckpointWriteError, match='it takes 1 MB.*has 0 MB free'):
            write_checkpoint(CONTENT, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_background_copy_does_not_change(tmp_path):
    weight = torch.zeros(10**6)
    writer, done = BackgroundWriter(), []
    writer.write(
        dict(state_dict=dict(w=weight)), tmp_path / 'a.pth', lambda: done.append(1)
    )
    weight.add_(1)
    writer.wait()
    assert done == [1]
    assert not read_checkpoint(tmp_path / 'a.pth')['state_dict']['w'].any()


@pytest.fixture
def quick_retry(monkeypatch):
    monkeypatch.setattr(checkpoint_hook, 'RETRY_SECONDS', 0.05)


class FullDisk:
    """Refuses some of the writes."""

    def __init__(self, monkeypatch, refused):
        self.calls = 0
        from convnext_mm.checkpoint import write

        real = write.write_checkpoint

        def maybe(content, path):
            self.calls += 1
            if self.calls in refused:
                raise CheckpointWriteError(f'{path} could not be written: full')
            real(content, path)

        monkeypatch.setattr(write, 'write_checkpoint', maybe)


def test_full_disk_costs_a_warning(tmp_path, monkeypatch, quick_retry):
    disk = FullDisk(monkeypatch, refused=(2, 3))
    runner = make(tmp_path)
    runner.train()
    assert disk.calls > 3
    assert names(tmp_path) == ['iter_11.pth']


def test_full_disk_never_removes_the_last(tmp_path, monkeypatch, quick_retry):
    FullDisk(monkeypatch, refused=range(2, 10**6))
    runner = make(tmp_path, checkpoint=dict(give_up_minutes=0.005))
    with pytest.raises(CheckpointWriteError, match=r'for 0.005 minutes.*iter_4.pth'):
        runner.train()
    assert names(tmp_path) == ['iter_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == 'iter_4.pth'


def test_full_disk_leaves_the_best_there_was(tmp_path, monkeypatch):
    from convnext_mm.checkpoint import write

    real = write.write_checkpoint

    def refuse(content, path):
        if path.name == 'best_score_iter_8.pth':
            raise CheckpointWriteError(f'{path} could not be written: full')
        real(content, path)

    monkeypatch.setattr(write, 'write_checkpoint', refuse)
    found = []

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            best = sorted(path.name for path in tmp_path.glob('best_*'))
            info = runner.message_hub.runtime_info
            found.append((best, info.get('best_score')))

    runner = make(
        tmp_path,
        checkpoint=dict(save_best='score', rule='greater'),
        scores={4: 0.2, 8: 0.5, 11: 0.3},
        hooks=[Look()],
    )
    runner.train()
    assert found[3:5] == [([], None), (['best_score_iter_4.pth'], 0.2)]
    assert found[8] == (['best_score_iter_4.pth'], 0.2)
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_iter_11.pth']


def test_resumed_without_its_best_takes_the_next(tmp_path):
    settings = dict(checkpoint=dict(save_best='score', rule='greater'))
    settings['scores'] = {4: 0.5, 8: 0.3, 11: 0.2}
    stopped = make(tmp_path, Fault(7, kill), **settings)
    with pytest.raises(Killed):
        stopped.train()
    os.unlink(tmp_path / 'best_score_iter_4.pth')
    make(tmp_path, resume=True, **settings).train()
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_score_iter_8.pth']


def test_resumed_when_it_was_over(tmp_path):
    make(tmp_path).train()
    runner = make(tmp_path, resume=True)
    runner.train()
    (log,) = Path(runner.log_dir).glob('*.log')
    assert 'nothing is left to train' in log.read_text()


def test_autosaves_by_time(tmp_path):
    runner = make(
        tmp_path, Fault(7, kill), checkpoint=dict(autosave_minutes=1e-9, interval=100)
    )
    with pytest.raises(Killed):
        runner.train()
    runner.writer.wait()
    assert names(tmp_path) == ['autosave_iter_5.pth']
    resumed = make(tmp_path, resume=True, checkpoint=dict(interval=100))
    resumed.train()
    straight = make(tmp_path / 'straight')
    straight.train()
    assert same(weights(resumed), weights(straight))
    assert names(tmp_path) == ['iter_11.pth']


@pytest.mark.parametrize(
    'change, words',
    [
        (dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.5))), 'lr was 0.01'),
        (dict(optim_wrapper=dict(accumulative_counts=2)), None),
        (dict(batch_size=1), None),
    ],
)
def test_changed_settings(change, words, tmp_path):
    def cfg(settings):
        optim = {'optimizer': dict(lr=0.01), **settings.get('optim_wrapper', {})}
        return dict(optim_wrapper=optim, max_keep=1)

    stopped = make(tmp_path, Fault(5, kill), cfg=cfg({}))
    with pytest.raises(Killed):
        stopped.train()
    stopped.writer.wait()
    resumed = make(tmp_path, resume=True, cfg=cfg(change), **change)
    if words is None:
        resumed.train()
    else:
        with pytest.raises(CheckpointMismatchError, match=words):
            resumed.train()


def test_epochs_with_other_batches_keep_their_schedule(tmp_path):
    """A schedule told in epochs counts steps: it goes on at its part of the run."""
    schedule = dict(
        type='CosineAnnealingLR',
        T_max=3,
        end=3,
        by_epoch=True,
        convert_to_iter_based=True,
    )
    stopped = make(tmp_path, Fault(9, kill), by_epoch=True, param_scheduler=schedule)
    with pytest.raises(Killed):
        stopped.train()
    stopped.writer.wait()
    assert names(tmp_path) == ['epoch_2.pth']
    resumed = make(
        tmp_path, by_epoch=True, param_scheduler=schedule, batch_size=1, resume=True
    )
    resumed.train()
    assert resumed.iter == 21  # 3 epochs of 7
    straight = make(
        tmp_path / 'straight', by_epoch=True, param_scheduler=schedule, batch_size=1
    )
    straight.train()
    ours, theirs = (run.param_schedulers[0] for run in (resumed, straight))
    assert (ours.last_step, ours.end) == (theirs.last_step, 21)
    rates = [run.optim_wrapper.get_lr()['lr'][0] for run in (resumed, straight)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-4)


def test_launcher_starts_nothing_again_after_a_mistake():
    """The launcher names a mistake once, last, and starts nothing again."""
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'convnext_mm.engine.launcher',
            'tools/train.py',
            'no.py',
        ],
        cwd=ROOT,
        env={**os.environ, 'GPUS': '2', 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: process') and "'no.py' does not exist" in last
    assert 'restart' not in done.stderr and 'Traceback' not in done.stderr


def test_restart_goes_on_from_files_of_other_names(tmp_path, monkeypatch):
    name = dict(filename_tmpl='step-{}.pth')
    stopped = make(tmp_path, Fault(6, kill), checkpoint=name)
    with pytest.raises(Killed):
        stopped.train()
    stopped.writer.wait()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    fault = Fault()
    make(tmp_path, fault, checkpoint=name).train()
    assert fault.first == 4
