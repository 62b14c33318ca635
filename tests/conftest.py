"""Fixtures that several test files use."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.utils import ManagerMixin
from torch.torch_version import TorchVersion

import speed
from repo import load_tool

# This process's kernels run in Triton's interpreter, on CPU tensors, with a GPU
# or without. Triton's own functions ask the environment when it is imported;
# programs that tests start must not find it there.
os.environ['TRITON_INTERPRET'] = '1'
try:
    import triton
    import triton.language

    from convnext_mm.ops.triton import _has_triton
except ImportError:  # not every PyTorch has it
    pass
else:
    if _has_triton():  # one that the kernels run on
        triton.knobs.runtime.interpret = True
        speed.quick_interpreter()
        load_tool('maintenance/check_kernels').round_as_gpus_do()
del os.environ['TRITON_INTERPRET']
speed.quick_configs()

from convnext_mm.checkpoint.reader import SAFE_TORCH  # noqa: E402, imports Triton

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    """Files with slow tests first: what comes last is short, so that workers
    end together. The order within a file stays, for its fixtures."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    items.sort(key=lambda item: item.path not in slow)


if TorchVersion(torch.__version__) < SAFE_TORCH:

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(item):
        """The package refuses every pickle with a PyTorch that cannot read them
        safely: what a test wants to see of one is not to be seen there."""
        try:
            return (yield)
        except Exception as error:
            if 'cannot read pickles safely' in str(error):
                pytest.skip(f'reading pickles needs PyTorch {SAFE_TORCH}')
            raise


@pytest.fixture(autouse=True)
def no_runs_left() -> Iterator[None]:
    """MMEngine names a run by the second in which it starts: one that starts
    in the same second would take the scope, the loggers and the visualizers of
    the test before it."""
    yield
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        vars(kind).get('_instance_dict', {}).clear()
    if 'toy_runs' in sys.modules:
        sys.modules['toy_runs'].forget_runs()


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
