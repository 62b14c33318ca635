"""Some of the faults that tools/maintenance/inject_faults.py injects; all of them
take an hour. Faults of files and of one process are in tests/engine."""

import shutil
from pathlib import Path

import pytest
import torch

from repo import load_tool

faults = load_tool('maintenance/inject_faults')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='no /proc'),
    pytest.mark.skipif(
        not torch.distributed.is_gloo_available(), reason='torch without gloo'
    ),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Undisturbed runs are made once for all faults."""
    path = tmp_path_factory.mktemp('faults')
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize(
    'name', ['kill-during-save', 'sigterm-two-processes', 'kill-rank-1']
)
def test_fault(name, folder):
    (outcome,) = faults.run_faults([name], folder)
    assert outcome.problems == []


def test_faults_are_many():
    assert len(faults.FAULTS) >= 60
