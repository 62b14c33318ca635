"""Fixtures that several test files use."""
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported: kernels run on the CPU.
    os.environ.setdefault('TRITON_INTERPRET', '1')

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def data_dir() -> Path:
    """Golden files and facts that the repository holds."""
    return ROOT / 'tests' / 'data'


@pytest.fixture(scope='session')
def shared_dir() -> Path:
    """Real images and sample checkpoints, beside the repository. They are not
    ours to redistribute, so tests that need them skip where they are missing.
    """
    path = Path(os.environ.get('CONVNEXT_MM_SHARED', ROOT.parent / 'shared'))
    if not path.is_dir():
        pytest.skip(f'{path} is missing (real images, sample checkpoints); '
                    'CONVNEXT_MM_SHARED can name another place')
    return path
