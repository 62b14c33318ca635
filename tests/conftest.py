"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest

# This process's kernels run in Triton's interpreter, on CPU tensors, with a GPU
# or without. Triton's own functions ask the environment when it is imported;
# programs that tests start must not find it there.
os.environ['TRITON_INTERPRET'] = '1'
try:
    import triton
    import triton.language
except ImportError:  # not every PyTorch has it
    pass
else:
    triton.knobs.runtime.interpret = True
del os.environ['TRITON_INTERPRET']

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
        pytest.skip(
            f'{path} is missing (real images, sample checkpoints); '
            'CONVNEXT_MM_SHARED can name another place'
        )
    return path
