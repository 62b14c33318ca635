"""Data workers that die and memory that runs out: each really, where a test can."""

import os
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from convnext_mm.datasets.data_check import DataError, GuardedLoad
from convnext_mm.datasets.worker_failures import explain_runtime_failure
from repo import ROOT

FULL_SHARED_MEMORY = """
import torch
from torch.utils.data import DataLoader
from convnext_mm.datasets.worker_failures import explain_runtime_failure
try:
    next(iter(DataLoader([torch.zeros(2**22)] * 2, batch_size=2, num_workers=1)))
except RuntimeError as error:
    print(explain_runtime_failure(error))
"""


class Failing(Dataset):
    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.fail()


def explain(fail, workers=1):
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        list(DataLoader(Failing(fail), num_workers=workers))
    traceback.clear_frames(caught.tb)  # ends the workers
    said = explain_runtime_failure(caught.value)
    assert said and '\n' not in said
    return said


def end_by(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.slow
def test_worker_that_the_system_killed():
    said = explain(end_by(signal.SIGKILL))
    assert 'was killed, as Linux does when memory runs out' in said
    assert 'num_workers lower' in said and 'persistent_workers=False' in said
    assert 'dmesg' in said and 'killed by signal: Killed' in said


@pytest.mark.slow
def test_worker_that_crashed():
    said = explain(end_by(signal.SIGSEGV))
    assert 'crashed' in said and 'num_workers=0' in said and 'Segmentation' in said


@pytest.mark.slow
def test_worker_that_shared_memory_ended():
    said = explain(end_by(signal.SIGBUS))
    assert '--shm-size' in said and 'Bus error' in said and '/dev/shm: ' in said


@pytest.mark.parametrize(
    'fail', [lambda: np.empty(2**60, np.uint8), lambda: torch.empty(2**60)]
)
@pytest.mark.parametrize('workers', [0, 1])
def test_no_memory(fail, workers):
    said = explain(fail, workers)
    assert 'the machine has no memory left' in said and 'num_workers lower' in said
    assert 'llocate' in said and 'Traceback' not in said


@pytest.mark.slow
def test_full_shared_memory():
    """A small one, where a container of its own may be had."""
    done = subprocess.run(
        [
            *('unshare', '-rm', 'sh', '-c'),
            'mount -t tmpfs -o size=2m tmpfs /dev/shm || exit 99; exec "$@"',
            *('sh', sys.executable, '-c', FULL_SHARED_MEMORY),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f'no file system of its own: {done.stderr}')
    assert done.stdout.startswith('shared memory') and '--shm-size' in done.stdout
    assert 'of 2 MiB' in done.stdout


@pytest.mark.parametrize(
    'error, words',
    [
        (
            torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.'),
            ("impl='lean+'", 'with_cp=True', '--amp', 'batch_size', '2 GiB'),
        ),
        (RuntimeError('CUDA error: out of memory'), ('device', 'batch_size')),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), ('device',)),
        (OSError(12, 'Cannot allocate memory'), ('machine', 'num_workers')),
        (
            RuntimeError(
                'unable to write to file </torch_12_34>: No space left on device (28)'
            ),
            ('shared memory', '--shm-size', 'num_workers'),
        ),
        (
            RuntimeError('DataLoader worker (pid(s) 12) exited unexpectedly'),
            ('was killed', 'num_workers'),
        ),
        (OSError(28, 'No space left on device'), ('df -h', '--work-dir', '/dev/shm')),
        (OSError(24, 'Too many open files'), ('ulimit -n',)),
        (RuntimeError('received 0 items of ancdata'), ('ulimit -n',)),
    ],
)
def test_what_a_test_cannot_bring_about(error, words):
    said = explain_runtime_failure(error)
    for word in words:
        assert word in said
    try:
        try:
            raise error
        finally:
            raise KeyError('the end of the loop')
    except KeyError as later:
        assert explain_runtime_failure(later) == said
    try:
        raise ValueError('instead') from None
    except ValueError as other:
        other.__context__ = error
        assert explain_runtime_failure(other) is None


@pytest.mark.parametrize(
    'error',
    [
        KeyError('mask'),
        ValueError('out of memory is a title here'),
        RuntimeError('mat1 and mat2 shapes cannot be multiplied'),
        FileNotFoundError(2, 'No such file or directory'),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_are_left_alone(error):
    assert explain_runtime_failure(error) is None


def test_errors_that_go_in_circles_end():
    first, second = KeyError('a'), KeyError('b')
    first.__cause__, second.__cause__ = second, first
    assert explain_runtime_failure(first) is None


def test_no_file_is_blamed_for_memory():
    dataset = type('D', (), dict(metainfo={}, test_mode=False))()

    def load_image(results):
        raise error

    for error in (MemoryError(), OSError(24, 'Too many open files')):
        with pytest.raises(type(error)):
            GuardedLoad(load_image, dataset)(dict(img_path='a.png'))
    error = OSError(5, 'Input/output error')
    with pytest.raises(DataError, match='Input/output'):
        GuardedLoad(load_image, dataset)(dict(img_path='a.png'))
