"""Drawn data that each test may break."""

import shutil
from pathlib import Path

import pytest

from convnext_mm.datasets import write_shapes
from repo import ROOT


@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    path = tmp_path_factory.mktemp('shapes')
    write_shapes(path, num_train=3, num_val=2, size=64)
    return path


@pytest.fixture
def data(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Path(shutil.copytree(drawn, tmp_path / 'data'))
