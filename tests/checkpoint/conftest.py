"""A small ConvNeXt, its checkpoint, and where results for the docs go."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from convnext_mm import ConvNeXt
from convnext_mm.checkpoint import fit, load
from toys import ARCH, randomise


@pytest.fixture
def arch() -> dict:
    return ARCH


@pytest.fixture
def model() -> ConvNeXt:
    return randomise(ConvNeXt(ARCH))


@pytest.fixture
def weights(model) -> dict[str, Tensor]:
    """State dict of a V1 backbone with output norms."""
    return dict(model.state_dict())


@pytest.fixture
def features():
    """Outputs for a fixed image."""

    def run(model: nn.Module, channels: int = 3):
        image = torch.rand(
            1, channels, 64, 96, generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            return model.eval()(image)

    return run


@pytest.fixture
def log_of(monkeypatch):
    """``log_of(module, ...)`` collects what modules log."""

    def collect(*modules):
        messages = []
        for module in modules:
            monkeypatch.setattr(
                module, 'print_log', lambda message, **_: messages.append(message)
            )
        return messages

    return collect


@pytest.fixture
def log(log_of):
    """Messages about what is loaded."""
    return log_of(fit, load)


@pytest.fixture(scope='session')
def record():
    """``record(table, row, value)`` collects results; with
    CONVNEXT_MM_RESULTS=FOLDER each table is written there as JSON."""
    tables: dict[str, dict] = {}
    yield lambda table, row, value: tables.setdefault(table, {}).update({row: value})
    folder = os.environ.get('CONVNEXT_MM_RESULTS')
    for table, rows in tables.items() if folder else ():
        (Path(folder) / f'{table}.json').write_text(json.dumps(rows, indent=2) + '\n')
