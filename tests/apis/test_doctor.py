"""What `convnext-mm doctor` finds in environments as they are and as they break."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections import namedtuple
from pathlib import Path

import pytest

from convnext_mm import cli
from convnext_mm.apis import doctor
from convnext_mm.apis.doctor import (
    Evidence,
    Finding,
    Fix,
    evidence,
    libraries,
    machine,
    pytorch,
)
from convnext_mm.apis.doctor.probe import Probe, try_program, try_steps
from convnext_mm.checkpoint import reader, remote
from convnext_mm.compat.mmcv_ops import __main__ as mmcv_ops
from convnext_mm.models import block
from repo import ROOT

GIB = 2**30
VERSIONS = {
    'convnext-mm': '0.1.0',
    'torch': '2.15.0',
    'torchvision': '0.29.2',
    'triton': '3.9.0',
    'numpy': '2.2.6',
    'rich': '15.0.0',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
    'opencv-python-headless': '4.12.0.88',
    'pycocotools': '2.0.11',
    'transformers': '4.57.6',
    'huggingface-hub': '0.36.2',
    'tensorboard': '2.20.0',
}
REQUIRES = {
    'convnext-mm': ['numpy', 'rich>=13', 'torch>=2.4', 'timm>=1; extra == "parity"'],
    'torchvision': ['numpy', 'torch==2.15.0', 'scipy; extra == "scipy"'],
}
NO_GPU = dict(cuda='13.2', hip=None, fault='', gpus=[], archs=[])
PROBES = {
    'torch': Probe('2.15.0+cu132'),
    'gpus': Probe(NO_GPU),
    'torchvision': Probe(),
    'impl': Probe([['cpu', 'float32', 'lean', ''], ['cpu', 'bfloat16', 'lean', '']]),
    'operators': Probe('the compiled operators of /site/mmcv import.'),
    'cv2': Probe('4.12.0'),
    **dict.fromkeys(
        ('convnext_mm', 'numpy', 'rich', 'pycocotools', 'mmdet', 'mmseg', 'mmpretrain'),
        Probe(),
    ),
}
BROKEN = Probe(error='ImportError: libcudart.so.13: cannot open shared object file')
SMI = Probe('NVIDIA H200, 580.65.06')
H200 = ['NVIDIA H200', [9, 0], 139 * GIB, '']


def known(
    versions=(), probes=(), without=(), requires=(), environ=(), **facts
) -> Evidence:
    """A good environment, but for what is given."""
    there = {**VERSIONS, **dict(versions)}
    return Evidence(
        {name: version for name, version in there.items() if name not in without},
        {**REQUIRES, **dict(requires)}.get,
        {**PROBES, **dict(probes)},
        dict(environ),
        **facts,
    )


def only(findings) -> Finding:
    (finding,) = findings
    return finding


def named(findings, name: str) -> Finding:
    return only(finding for finding in findings if finding.name == name)


def says(finding: Finding, state: str, message: str = '', advice: str = '') -> None:
    assert finding.state == state, finding
    assert message in finding.message, finding
    assert advice in finding.advice, finding
    assert finding.advice or state != 'problem', finding
    if state == 'ok':
        assert not finding.advice, finding


# Python and PyTorch.


@pytest.mark.parametrize(
    'version, state',
    [
        ((3, 9, 2), 'problem'),
        ((3, 10, 0), 'ok'),
        ((3, 13, 5), 'ok'),
        ((3, 14, 0), 'note'),
    ],
)
def test_python(version, state):
    says(
        only(libraries.python(known(python=version))),
        state,
        '.'.join(map(str, version)),
    )


def test_virtual_environment(tmp_path):
    says(only(libraries.environment(known(prefixes=('/venv', '/usr')))), 'ok', '/venv')
    system = known(prefixes=(str(tmp_path), str(tmp_path)))
    says(only(libraries.environment(system)), 'note', 'system', '-m venv')
    (tmp_path / 'conda-meta').mkdir()
    says(only(libraries.environment(system)), 'ok')


@pytest.mark.parametrize(
    'probe, without, state, message, advice',
    [
        (Probe('2.15.0+cu132'), (), 'ok', '2.15.0+cu132', ''),
        (Probe('2.10.0'), (), 'ok', '2.10.0', ''),
        (Probe('2.9.1'), (), 'note', 'pickles', 'CONVNEXT_MM_TRUST_PICKLE'),
        (Probe('2.3.1+cpu'), (), 'problem', '2.4 or later', '--upgrade torch'),
        (BROKEN, (), 'problem', 'torch 2.15.0 does not import', '--force-reinstall'),
        (
            Probe(error='the process was ended by SIGSEGV'),
            (),
            'problem',
            'SIGSEGV',
            'LD_LIBRARY_PATH',
        ),
        (
            Probe(error='the process was ended by SIGILL'),
            (),
            'problem',
            'SIGILL',
            'another one of torch',
        ),
        (
            Probe(error="ModuleNotFoundError: No module named 'torch'"),
            ('torch',),
            'problem',
            'not installed',
            '`pip install torch torchvision`',
        ),
    ],
)
def test_torch(probe, without, state, message, advice):
    found = only(pytorch.torch(known(probes={'torch': probe}, without=without)))
    says(found, state, message, advice)


@pytest.mark.parametrize(
    'changes, state, message, advice',
    [
        ({}, 'ok', '0.29.2', ''),
        (
            dict(requires={'torchvision': ['torch==2.11.0']}),
            'problem',
            'is for torch==2.11.0, and torch is 2.15.0',
            '`pip install --upgrade torchvision "torch==2.15.0"`',
        ),
        (
            dict(
                probes={
                    'torchvision': Probe(
                        error='RuntimeError: operator torchvision::nms does not exist'
                    )
                }
            ),
            'problem',
            'torchvision::nms does not exist',
            '--force-reinstall --no-deps "torchvision==0.29.2"',
        ),
        (
            dict(versions={'torchvision': '0.29.2+cpu'}),
            'problem',
            'its build is another',
            '--force-reinstall --no-deps "torchvision==0.29.2"',
        ),
        (
            dict(without=['torchvision'], probes={'torchvision': BROKEN}),
            'problem',
            'is not installed',
            '`pip install --upgrade torchvision "torch==2.15.0"`',
        ),
        (
            dict(
                without=[n for n in VERSIONS if n.startswith(('onedl', 'torchvision'))],
                probes={'torchvision': BROKEN},
            ),
            'note',
            'is not installed',
            '`pip install --upgrade torchvision "torch==2.15.0"`',
        ),
        (
            dict(probes={'torch': BROKEN, 'torchvision': BROKEN}),
            'note',
            'torch does not import',
            '',
        ),
    ],
)
def test_torchvision(changes, state, message, advice):
    found = only(pytorch.torchvision(known(**changes)))
    says(found, state, message, advice)


@pytest.mark.parametrize(
    'found, smi, environ, state, message, advice',
    [
        (NO_GPU, None, {}, 'ok', 'none; CUDA 13.2 build', ''),
        (
            NO_GPU | dict(fault='The NVIDIA driver on your system is too old'),
            SMI,
            {},
            'problem',
            'sees none: The NVIDIA driver on your system is too old',
            'update the driver',
        ),
        (
            NO_GPU | dict(cuda=None),
            SMI,
            {},
            'problem',
            'NVIDIA H200, 580.65.06, and torch is a CPU build',
            'without the index of CPU builds',
        ),
        (
            NO_GPU,
            Probe(error="couldn't communicate with the NVIDIA driver"),
            {},
            'problem',
            "nvidia-smi fails (couldn't communicate",
            '--gpus all',
        ),
        (NO_GPU, SMI, {'CUDA_VISIBLE_DEVICES': ''}, 'note', 'hidden', 'unset'),
        (NO_GPU, SMI, {'CUDA_VISIBLE_DEVICES': '-1'}, 'note', 'hidden', 'unset'),
        (
            NO_GPU | dict(fault='no such device'),
            SMI,
            {'CUDA_VISIBLE_DEVICES': '0'},
            'problem',
            'no such device',
            'update the driver',
        ),
    ],
)
def test_no_gpu(found, smi, environ, state, message, advice):
    probes = {'gpus': Probe(found)}
    if smi:
        probes['nvidia-smi'] = smi
    found = only(pytorch.gpus(known(probes=probes, environ=environ)))
    says(found, state, message, advice)


def test_gpus():
    old = ['GeForce GTX 1080', [6, 1], 8 * GIB, '']
    ill = ['NVIDIA H200', [9, 0], 139 * GIB, 'CUDA error: uncorrectable ECC error']
    found = NO_GPU | dict(gpus=[H200, old, ill], archs=['sm_80', 'sm_90'])
    evidence = known(probes={'gpus': Probe(found), 'nvidia-smi': SMI})
    build, *gpus = pytorch.gpus(evidence)
    says(build, 'ok', 'CUDA 13.2, driver 580.65.06')
    says(gpus[0], 'ok', 'NVIDIA H200, 139 GiB, compute capability 9.0')
    says(gpus[1], 'problem', '6.1: this PyTorch has code for sm_80, sm_90', 'install')
    says(gpus[2], 'problem', 'uncorrectable ECC error', 'CUDA_VISIBLE_DEVICES')


def test_gpus_that_cannot_be_asked():
    crash = Probe(error='the process was ended by SIGABRT')
    says(
        only(pytorch.gpus(known(probes={'gpus': crash}))),
        'problem',
        'SIGABRT',
        'update the driver',
    )
    evidence = known(probes={'torch': BROKEN, 'gpus': BROKEN, 'nvidia-smi': SMI})
    says(only(pytorch.gpus(evidence)), 'note', 'nvidia-smi sees NVIDIA H200')


@pytest.mark.parametrize(
    'capability, archs, has',
    [
        ((9, 0), ['sm_80', 'sm_90'], True),
        ((8, 6), ['sm_80'], True),  # binaries run on later ones of a major version
        ((8, 0), ['sm_86'], False),
        ((9, 0), ['sm_80'], False),
        ((12, 0), ['sm_90', 'compute_90'], True),  # the driver compiles
        ((7, 5), ['sm_80', 'compute_80'], False),
        ((9, 0), ['sm_90a'], True),
        ((10, 0), ['sm_90a', 'compute_90a'], False),  # for that one only
        ((12, 1), ['sm_120'], True),
        ((9, 4), ['gfx942'], True),
        ((9, 0), [], True),
    ],
)
def test_code_for_a_gpu(capability, archs, has):
    assert pytorch.has_code_for(*capability, archs) is has


@pytest.mark.parametrize(
    'picks, environ, state, message',
    [
        ([['cpu', 'float32', 'lean', '']], {}, 'ok', "impl='auto' picks 'lean' (fused"),
        (
            [['cpu', 'float32', 'eager', 'PyTorch has no gelu_backward']],
            {},
            'note',
            "picks 'eager' (plain PyTorch) for float32: PyTorch has no gelu_backward",
        ),
        (
            [
                ['cuda:0', 'float32', 'triton', ''],
                ['cuda:0', 'bfloat16', 'eager', 'off by 3'],
            ],
            {},
            'note',
            "'triton' (fused kernels) for float32, 'eager' (plain PyTorch) for "
            'bfloat16: off by 3',
        ),
        ([['cuda:0', 'float32', 'triton', '']], {}, 'ok', "picks 'triton'"),
        (
            [['cpu', 'float32', 'lean+', '']],
            {'CONVNEXT_MM_IMPL': 'lean+'},
            'note',
            'CONVNEXT_MM_IMPL=lean+ picks',
        ),
        (
            [['cpu', 'float32', None, "unknown CONVNEXT_MM_IMPL 'fast'"]],
            {'CONVNEXT_MM_IMPL': 'fast'},
            'problem',
            "unknown CONVNEXT_MM_IMPL 'fast'",
        ),
        (
            [['cuda:0', 'float32', None, 'CUDA error: out of memory']],
            {},
            'problem',
            'CUDA error: out of memory',
        ),
    ],
)
def test_impl(picks, environ, state, message):
    findings = pytorch.impl(known(probes={'impl': Probe(picks)}, environ=environ))
    found, triton = findings
    advice = 'CONVNEXT_MM_IMPL' if state == 'problem' else ''
    says(found, state, message, advice)
    says(triton, 'ok', '3.9.0')
    assert ('NVIDIA' in triton.message) is (picks[0][0] == 'cpu')


def test_impl_without_torch():
    evidence = known(probes={'torch': BROKEN, 'impl': BROKEN})
    says(only(pytorch.impl(evidence)), 'note', 'not examined: torch does not import')


# OpenMMLab's libraries, and others.


@pytest.mark.parametrize(
    'package, one, other',
    [
        ('mmengine', 'onedl-mmengine', 'mmengine'),
        ('mmcv', 'onedl-mmcv', 'mmcv'),
        ('mmcv', 'onedl-mmcv', 'mmcv-lite'),
        ('mmcv', 'onedl-mmcv', 'mmcv-full'),
        ('mmdet', 'onedl-mmdetection', 'mmdet'),
        ('mmseg', 'onedl-mmsegmentation', 'mmsegmentation'),
        ('mmpretrain', 'onedl-mmpretrain', 'mmpretrain'),
    ],
)
def test_two_distributions_of_one_package(package, one, other):
    evidence = known({other: '1.0'})
    findings = [*libraries.openmmlab(evidence), *libraries.tasks(evidence)]
    found = only(finding for finding in findings if finding.state == 'problem')
    assert found.name == package
    says(found, 'problem', f'{one} {VERSIONS[one]}, {other} 1.0 are all')
    assert f'`pip uninstall --yes {one} {other}`' in found.advice
    assert f'`pip install {one}`' in found.advice


def test_one_distribution_of_each_package():
    engine, mmcv = libraries.openmmlab(known())
    says(engine, 'ok', 'onedl-mmengine 0.10.12')
    says(mmcv, 'ok', 'onedl-mmcv 2.3.6')
    old = known({'mmengine': '0.10.7'}, without=['onedl-mmengine'])
    says(next(libraries.openmmlab(old)), 'ok', 'mmengine 0.10.7')


def test_no_mmengine():
    evidence = known(
        without=['onedl-mmengine'],
        probes={
            name: Probe(error="ModuleNotFoundError: No module named 'mmengine'")
            for name in ('mmdet', 'convnext_mm')
        },
    )
    found = named(libraries.openmmlab(evidence), 'mmengine')
    says(found, 'problem', 'not installed', '`pip install onedl-mmengine`')
    # What fails for this reason is no further problem.
    for check in (libraries.tasks, libraries.package):
        says(next(iter(check(evidence))), 'note', 'not examined: there is no mmengine')


@pytest.fixture
def mmcv(tmp_path, monkeypatch):
    """What the installer of the operators says of a folder, as a probe."""
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    monkeypatch.setattr(mmcv_ops, 'mmcv_folder', lambda: folder)
    return folder


def examined_operators(**changes) -> Finding:
    status = Probe(mmcv_ops.status())
    return only(libraries.operators(known(probes={'operators': status}, **changes)))


def test_operators_none(mmcv):
    found = examined_operators()
    says(found, 'problem', f'{mmcv} has no operators', 'brings them')
    assert f'`{mmcv_ops.COMMAND}`' in found.advice
    assert str(evidence.OPERATORS_SCRIPT) in found.fix.text


def test_operators_on_torchvision(mmcv):
    (mmcv / '_ext').mkdir()
    place = mmcv / '_ext' / '__init__.py'
    shutil.copy(mmcv_ops.SOURCE, place)
    says(examined_operators(), 'ok', 'on torchvision')
    place.write_text(f'{place.read_text()}\n# older')
    says(examined_operators(), 'problem', 'another version', 'up to date')


def test_operators_compiled(mmcv, monkeypatch):
    (mmcv / f'_ext{mmcv_ops.EXTENSION_SUFFIXES[0]}').write_bytes(b'')
    monkeypatch.setattr(mmcv_ops, 'compiled_fault', lambda folder: None)
    says(examined_operators(), 'ok', 'the compiled operators')
    fault = 'ImportError: undefined symbol: _ZN2at4_ops; see c++filt'
    monkeypatch.setattr(mmcv_ops, 'compiled_fault', lambda folder: fault)
    found = examined_operators()
    says(found, 'problem', fault, 'puts those on torchvision in their place')
    assert found.fix


def test_operators_without_mmcv(monkeypatch):
    monkeypatch.setattr(mmcv_ops, 'mmcv_folder', lambda: None)
    found = examined_operators(without=['onedl-mmcv'])
    says(found, 'problem', 'there is no mmcv', 'installs it')
    assert found.fix
    heads = ['onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain']
    found = examined_operators(without=['onedl-mmcv', *heads])
    says(found, 'note', 'there is no mmcv', 'installs it')
    assert found.fix is None


def test_operators_that_cannot_be_tried():
    stopped = Probe(error='stopped: PyTorch does not import (ImportError), so ...')
    found = only(libraries.operators(known(probes={'operators': stopped})))
    says(found, 'note', 'not examined: PyTorch does not import')


def test_the_fix_of_the_operators(tmp_path, monkeypatch, capfd):
    script = tmp_path / 'install.py'
    monkeypatch.setattr(libraries, 'OPERATORS_SCRIPT', script)
    script.write_text('import sys; print("with", sys.argv[1:])')
    fix = libraries.operators_fix()
    fix.run()
    out, err = capfd.readouterr()
    assert out == ''  # it may be JSON
    assert err == "with ['--no-deps']\n"
    script.write_text('raise SystemExit(1)')
    with pytest.raises(subprocess.CalledProcessError):
        fix.run()


@pytest.mark.parametrize(
    'name, task, distribution',
    [
        ('mmdet', 'detection', 'onedl-mmdetection'),
        ('mmseg', 'segmentation', 'onedl-mmsegmentation'),
        ('mmpretrain', 'classification', 'onedl-mmpretrain'),
    ],
)
def test_tasks(name, task, distribution):
    works = f'works with {distribution} {VERSIONS[distribution]}'
    says(named(libraries.tasks(known()), task), 'ok', works)
    absent = named(libraries.tasks(known(without=[distribution])), task)
    says(absent, 'note', f'there is no {name}', f'`pip install {distribution}`')
    for error, advice in {
        'TypeError: NoneType takes no arguments': '"transformers<5"',
        "ModuleNotFoundError: No module named 'mmcv._ext'": mmcv_ops.COMMAND,
        'ImportError: /site/mmcv/_ext.so: undefined symbol: x': mmcv_ops.COMMAND,
        "ModuleNotFoundError: No module named 'terminaltables'": 'terminaltables',
        'AssertionError: MMCV==2.2.0 is used but incompatible': 'version',
        'ValueError: numpy.dtype size changed, may indicate': 'another NumPy',
        'OSError: something else': f'--no-deps {distribution}',
    }.items():
        evidence = known(probes={name: Probe(error=error)})
        found = named(libraries.tasks(evidence), task)
        says(found, 'problem', f'`import {name}.models` fails: {error}', advice)
    broken = known(probes={'torch': BROKEN, name: BROKEN})
    says(named(libraries.tasks(broken), task), 'note', 'torch does not import')


def test_transformers():
    assert not list(libraries.transformers(known()))
    new = {'transformers': '5.23.0'}
    found = only(libraries.transformers(known(new)))
    says(found, 'problem', '5.23.0: mmpretrain', '`pip install "transformers<5"`')
    assert not list(libraries.transformers(known(new, without=['onedl-mmpretrain'])))


def test_package():
    own, others = libraries.package(known())
    says(own, 'ok', f'0.1.0 from {ROOT}')
    says(others, 'ok', 'numpy 2.2.6, rich 15.0.0')
    own, *_ = libraries.package(known(without=['convnext-mm']))
    says(own, 'note', f'not installed, used from {ROOT}')
    fault = Probe(error='SyntaxError: invalid syntax (convnext.py, line 3)')
    own, *_ = libraries.package(known(probes={'convnext_mm': fault}))
    says(own, 'problem', 'SyntaxError', '`pip install .`')


def test_requirements_of_the_package():
    gone = Probe(error="ModuleNotFoundError: No module named 'rich'")
    evidence = known(without=['rich'], probes={'rich': gone})
    found = named(libraries.package(evidence), 'rich')
    says(found, 'problem', 'is not installed', '`pip install --upgrade "rich>=13"`')
    found = named(libraries.package(known({'rich': '12.6'})), 'rich')
    says(found, 'problem', '12.6; needed is >=13', '"rich>=13"')
    hurt = Probe(error='ImportError: cannot load module more than once per process')
    found = named(libraries.package(known(probes={'numpy': hurt})), 'numpy')
    says(found, 'problem', '2.2.6 does not import', '--force-reinstall "numpy"')


@pytest.mark.parametrize(
    'versions, error, state, message, advice',
    [
        ({}, '', 'ok', 'opencv-python-headless 4.12.0.88', ''),
        ({'opencv-python': '4.12.0.88'}, '', 'ok', 'opencv-python 4.12.0.88', ''),
        (
            {'opencv-python': '4.13.0.2'},
            '',
            'problem',
            'overwrite each other',
            '`pip install --no-deps "opencv-python==4.12.0.88"`, then `pip install '
            '--force-reinstall --no-deps "opencv-python-headless==4.12.0.88"`',
        ),
        (
            {'opencv-python': '4.12.0.88'},
            'ImportError: libGL.so.1: cannot open shared object file',
            'problem',
            'libGL.so.1',
            '`pip install --force-reinstall --no-deps opencv-python-headless`',
        ),
        (
            {},
            "AttributeError: module 'cv2' has no attribute '__version__'",
            'problem',
            'does not import',
            '--force-reinstall',
        ),
        (
            {},
            'ImportError: numpy.core.multiarray failed to import',
            'problem',
            'multiarray',
            'another NumPy',
        ),
    ],
)
def test_opencv(versions, error, state, message, advice):
    evidence = known(versions, probes={'cv2': Probe('4.12.0', error)})
    says(only(libraries.opencv(evidence)), state, message, advice)


def test_no_opencv():
    gone = Probe(error="ModuleNotFoundError: No module named 'cv2'")
    evidence = known(without=['opencv-python-headless'], probes={'cv2': gone})
    found = only(libraries.opencv(evidence))
    says(found, 'problem', 'not installed', '`pip install opencv-python-headless`')
    assert evidence.obstacle() == 'OpenCV does not import'
    conda = known(without=['opencv-python-headless'])
    says(only(libraries.opencv(conda)), 'ok', '4.12.0')


def test_compiled_for_another_numpy():
    assert not list(libraries.compiled(known()))
    fault = Probe(error='ValueError: numpy.dtype size changed, may indicate binary')
    found = only(libraries.compiled(known(probes={'pycocotools': fault})))
    says(found, 'problem', '`import pycocotools.mask` fails', '--no-deps pycocotools')


def test_optional_libraries():
    assert {f.state for f in libraries.optional(known())} == {'ok'}
    hub, board = libraries.optional(known(without=['huggingface-hub', 'tensorboard']))
    says(hub, 'note', 'hf:// and timm://', '`pip install huggingface-hub`')
    says(board, 'note', 'TensorBoard', '`pip install tensorboard`')


# The machine, the cache and the data.


def test_processor(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 3})
    says(only(machine.processor(known())), 'ok', '4 cores')
    for threads, state in {'4': 'ok', '8': 'note', '0': 'note', 'x': 'note'}.items():
        found = only(machine.processor(known(environ={'OMP_NUM_THREADS': threads})))
        advice = 'set it to 4 or less' if state == 'note' else ''
        says(found, state, f'OMP_NUM_THREADS={threads}', advice)


def test_memory(tmp_path, monkeypatch):
    limit = tmp_path / 'memory.max'
    monkeypatch.setattr(machine, 'MEMORY_LIMITS', (limit,))
    pages = {'SC_PHYS_PAGES': 4 * 2**20, 'SC_PAGE_SIZE': 4096}
    monkeypatch.setattr(os, 'sysconf', pages.__getitem__)
    says(only(machine.memory(known())), 'ok', '16.0 GiB')
    limit.write_text('max\n')
    says(only(machine.memory(known())), 'ok', '16.0 GiB')
    limit.write_text(f'{2 * GIB}\n')
    says(only(machine.memory(known())), 'note', '2.0 GiB', 'num_workers=0')


Usage = namedtuple('Usage', 'total used free')


def test_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, 'SHARED_MEMORY', tmp_path)
    for size, state in {GIB: 'ok', GIB // 16: 'problem'}.items():
        usage = Usage(size, 0, size)
        monkeypatch.setattr(shutil, 'disk_usage', lambda _, usage=usage: usage)
        found = only(machine.shared_memory(known()))
        says(found, state, f'{size / GIB:.2f} GiB', '--shm-size' * (state != 'ok'))
    monkeypatch.setattr(machine, 'SHARED_MEMORY', tmp_path / 'none')
    assert not list(machine.shared_memory(known()))


def test_disk(tmp_path, monkeypatch):
    room = {tmp_path: 9 * GIB, tmp_path.parent: 3 * GIB}
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, room[path]))
    # The cache is not there yet: the disk is that of the folder it will be in.
    places = dict(
        environ={'CONVNEXT_MM_CACHE': str(tmp_path.parent / 'a' / 'b')}, folder=tmp_path
    )
    here, cache = machine.disk(known(**places))
    says(here, 'ok', '9.0 GiB free')
    says(cache, 'ok', '3.0 GiB free')
    room.update({tmp_path: 7 * GIB, tmp_path.parent: GIB})
    here, cache = machine.disk(known(**places))
    says(here, 'note', '7.0 GiB free', '--work-dir')
    says(cache, 'note', '1.0 GiB free', 'CONVNEXT_MM_CACHE')


def in_cache(folder: Path) -> Evidence:
    return known(environ={'CONVNEXT_MM_CACHE': str(folder)})


def test_cache(tmp_path):
    says(only(machine.cache(in_cache(tmp_path / 'none'))), 'ok', '0 checkpoints')
    weights, partial, old = (
        tmp_path / '0123456789abcdef' / name
        for name in ('a.pth', 'b.pth.x.incomplete', 'c.pth.x.incomplete')
    )
    others = tmp_path / 'blobs' / 'd.incomplete'
    weights.parent.mkdir()
    others.parent.mkdir()
    for path in (weights, partial, old, others):
        path.write_bytes(bytes(2**20))
    weights.with_name('a.pth.lock').touch()
    found = only(machine.cache(in_cache(tmp_path)))
    says(found, 'ok', '1 checkpoints, 0.00 GiB, 2 incomplete downloads, 1 lock files')
    for path in (old, others):
        os.utime(path, (0, time.time() - 2 * machine.DAY))
    found = only(machine.cache(in_cache(tmp_path)))
    says(found, 'note', '1 of them older than a day', '--fix')
    found.fix.run()
    assert weights.exists() and partial.exists() and not old.exists()
    assert others.exists()
    says(only(machine.cache(in_cache(tmp_path))), 'ok', '1 incomplete')


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    # Root may write everywhere.
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path)
    found = only(machine.cache(in_cache(tmp_path / 'cache')))
    says(found, 'problem', 'cannot be written', 'set CONVNEXT_MM_CACHE')
    homeless = in_cache(Path('~nobody-of-this-name/cache'))
    says(only(machine.cache(homeless)), 'problem', 'home', 'set CONVNEXT_MM_CACHE')


@pytest.mark.parametrize(
    'environ', [{}, {'XDG_CACHE_HOME': '/a'}, {'CONVNEXT_MM_CACHE': '~/b'}]
)
def test_the_cache_is_that_of_downloads(environ, monkeypatch):
    for name in ('XDG_CACHE_HOME', 'CONVNEXT_MM_CACHE'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert machine.cache_folder(known(environ=environ)) == remote.cache_dir()


@pytest.mark.parametrize('name', machine.DATA)
def test_data(name, tmp_path):
    place, parts, advice = machine.DATA[name]
    evidence = known(folder=tmp_path)
    says(named(machine.data(evidence), name), 'note', f'{place} is not here', advice)
    for part in parts:
        path = tmp_path / place / part
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text('{}')
        else:
            path.mkdir(exist_ok=True)
            (path / 'one.png').touch()
    says(named(machine.data(evidence), name), 'ok', f'{place} is complete')
    shutil.rmtree(tmp_path / place / parts[1])
    found = named(machine.data(evidence), name)
    says(found, 'problem', f'missing or empty: {parts[1]}', advice)
    (tmp_path / place / parts[1]).mkdir()
    assert named(machine.data(evidence), name) == found
    shutil.rmtree(tmp_path / place)
    (tmp_path / place).symlink_to(tmp_path / 'gone')
    says(named(machine.data(evidence), name), 'problem', ', '.join(parts), advice)


# Trying things.


def test_steps_that_fail(tmp_path):
    (tmp_path / 'kills.py').write_text('import os, signal; os.kill(os.getpid(), 9)')
    (tmp_path / 'raises.py').write_text('raise ImportError("first\\nlast line\\n")')
    (tmp_path / 'leaves.py').write_text('raise SystemExit("what it says")')
    (tmp_path / 'prints.py').write_text('print("no newline", end="")')
    path = f'import sys; sys.path.append({str(tmp_path)!r}); import '
    steps = {
        name: f'{path}{name}; found = {name!r}'
        for name in ('prints', 'kills', 'raises', 'leaves', 'missing', 'json')
    }
    assert try_steps(steps) == {
        'prints': Probe('prints'),
        'kills': Probe(error='the process was ended by SIGKILL'),
        'raises': Probe(error='ImportError: last line'),
        'leaves': Probe(error='SystemExit: what it says'),
        'missing': Probe(error="ModuleNotFoundError: No module named 'missing'"),
        'json': Probe('json'),
    }


def test_steps_after_a_failure_start_anew():
    steps = {'a': 'import sys; sys.left = 1; 1 / 0', 'b': 'import sys; sys.left'}
    assert 'no attribute' in try_steps(steps)['b'].error


def test_steps_that_need_the_first():
    steps = {'a': '1 / 0', 'b': 'found = 1'}
    fault = Probe(error='ZeroDivisionError: division by zero')
    assert try_steps(steps, need_first=True) == {'a': fault, 'b': fault}
    assert try_steps(steps) == {'a': fault, 'b': Probe(1)}
    later = {'a': 'found = 1', 'b': '1 / 0', 'c': 'found = 3'}
    expected = {'a': Probe(1), 'b': fault, 'c': Probe(3)}
    assert try_steps(later, need_first=True) == expected


@pytest.mark.slow
def test_steps_that_do_not_end():
    steps = {'a': 'found = 1', 'b': 'import time; time.sleep(60)', 'c': 'found = 3'}
    late = Probe(error='it did not end within 1.5 s')
    assert try_steps(steps, timeout=1.5) == {'a': Probe(1), 'b': late, 'c': late}


def test_programs():
    assert try_program(sys.executable, '-c', 'print(1)') == Probe('1')
    fault = 'import sys; sys.exit("why\\nlast")'
    assert try_program(sys.executable, '-c', fault) == Probe(error='last')
    # nvidia-smi says on standard output what is wrong.
    fault = 'print("No devices were found"); raise SystemExit(6)'
    assert try_program(sys.executable, '-c', fault).error == 'No devices were found'
    assert 'No such file' in try_program('/no/such/program').error


@pytest.mark.parametrize(
    'specifier, version, allowed',
    [
        ('>=2.4', '2.10.1+cu130', True),
        ('>=2.4', '2.3.9', False),
        ('==2.15.0', '2.15', True),
        ('==2.15.0', '2.15.1', False),
        ('>=4.53,<5', '5.0.0rc1', False),
        ('(>=4.53, <5)', '4.57.6', True),
        ('!=1.2', '1.2', False),
        ('<=2', '2.0.1', False),
        ('>2', '2.0.1', True),
        ('', '0', True),
    ],
)
def test_versions(specifier, version, allowed):
    assert evidence.allows(specifier, version) is allowed


def test_requirements_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    wanted = setup['options']['install_requires'].lower().split()
    found = evidence.own_requirements(known(requires={'convnext-mm': wanted}))
    assert [name + limits for name, limits in found] == wanted
    assert f'torch>={pytorch.OLDEST_TORCH}' in wanted
    assert evidence.requirements('no-such-distribution') is None


def test_facts_that_other_modules_hold():
    assert pytorch.SAFE_TORCH == reader.SAFE_TORCH
    assert libraries.OPERATORS_COMMAND == mmcv_ops.COMMAND
    assert set(pytorch.BLOCKS) < set(block.IMPLEMENTATIONS)
    assert Path(mmcv_ops.__file__) == evidence.OPERATORS_SCRIPT


# The report.


def test_a_check_that_fails_is_no_end(monkeypatch):
    def broken(evidence):
        raise PermissionError('/proc')
        yield

    monkeypatch.setattr(doctor, 'GROUPS', {'A': (broken, libraries.python)})
    (ill, well) = doctor.examine(known())['A']
    says(ill, 'note', 'not examined: PermissionError: /proc')
    assert ill.name == 'broken'
    says(well, 'ok')


@pytest.fixture
def report(monkeypatch, capsys):
    """What the command prints and its status, for findings of several visits."""

    def of(*visits, options=()):
        rest = iter(visits)
        monkeypatch.setattr('convnext_mm.cli.doctor.examine', lambda: next(rest))
        status = cli.main(['doctor', *options])
        assert next(rest, None) is None
        return status, *capsys.readouterr()

    return of


GOOD = {'Python': [Finding('version', 'ok', '3.12')]}
BAD = {
    'Python': [Finding('version', 'ok', '3.12')],
    'PyTorch': [
        Finding('torch', 'problem', 'does not import: ' + 'x ' * 99, 'install ' * 30),
        Finding('GPU', 'note', 'not examined'),
        Finding('torchvision', 'problem', 'is old', '`pip install torchvision`'),
    ],
}


def test_report(report):
    status, out, err = report(GOOD)
    assert (status, err) == (0, '')
    assert out.splitlines() == [
        '',
        'Python',
        '  ok       version          3.12',
        '',
        'no problem found',
    ]
    status, out, _ = report(BAD)
    assert status == 1
    assert out.endswith('\n2 problems: torch, torchvision\n')
    lines = out.splitlines()
    assert max(map(len, lines)) < 80
    assert '  problem  torchvision      is old' in lines
    place = lines.index('  problem  torchvision      is old')
    assert lines[place + 1] == '           -> `pip install torchvision`'


def test_report_for_programs(report):
    status, out, _ = report(BAD, options=['--json'])
    assert status == 1
    findings = json.loads(out)['findings']
    assert findings[-1] == dict(
        group='PyTorch',
        name='torchvision',
        state='problem',
        message='is old',
        advice='`pip install torchvision`',
        fix=None,
    )
    assert len(findings) == 4


@pytest.mark.parametrize('options', [['--fix'], ['--fix', '--json']])
def test_fix(report, options):
    done = []
    fix = Fix('mend it', lambda: done.append(1))
    ill = {'Python': [Finding('version', 'problem', 'ill', 'mend', fix)]}
    status, out, err = report(ill, GOOD, options=options)
    assert (status, done) == (0, [1])
    assert err == 'fix: mend it\n'
    assert 'mend' not in out
    # Nothing is done unasked.
    assert report(ill, options=options[1:])[0] == 1
    assert done == [1]


def test_fix_that_fails(report):
    def fail():
        raise OSError('disk is full')

    ill = {
        'Python': [Finding('version', 'problem', 'ill', 'mend', Fix('mend it', fail))]
    }
    status, _, err = report(ill, ill, options=['--fix'])
    assert status == 1
    assert err == 'fix: mend it\nnot done: disk is full\n'


def test_nothing_to_fix(report):
    status, out, err = report(BAD, options=['--fix'])
    assert (status, err) == (1, 'fix: there is nothing to do\n')
    assert out.endswith('2 problems: torch, torchvision\n')


# Programs.


def run_doctor(*options, path: Path = ROOT, cwd: Path = ROOT, python=sys.executable):
    """In the folder ``cwd``, with ``path`` before what is installed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{path}:{ROOT}'}
    return subprocess.run(
        [python, '-m', 'convnext_mm', 'doctor', *options],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_this_environment():
    import torch

    done = run_doctor('--json')
    findings = json.loads(done.stdout)['findings']
    found = {finding['name']: finding for finding in findings}
    assert found['torch']['message'].startswith(torch.__version__.partition('+')[0])
    assert found['torch']['state'] in ('ok', 'note')  # old ones read no pickles
    assert found['impl, CPU']['state'] in ('ok', 'note')
    for name in ('torchvision', 'mmengine', 'OpenCV', 'requirements'):
        assert found[name]['state'] == 'ok', found[name]
    assert not [f for f in findings if 'overwrite each other' in f['message']]
    assert done.returncode == any(f['state'] == 'problem' for f in findings)


@pytest.mark.slow
@pytest.mark.parametrize(
    'code, message',
    [
        ('raise ImportError("libcudart.so.13: cannot open")', 'libcudart.so.13'),
        ('import os; os.kill(os.getpid(), 11)', 'SIGSEGV'),
    ],
)
def test_broken_torch(code, message, tmp_path):
    """On the path before the installed one; nothing of the report needs it."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text(code)
    done = run_doctor(path=tmp_path, cwd=tmp_path)
    text = ' '.join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert 'does not import:' in text
    assert message in text
    assert '-> `pip install --force-reinstall torch torchvision`' in text
    assert 'not examined: torch does not import' in text
    assert 'Traceback' not in done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith('1 problem: torch'), done.stdout


@pytest.mark.slow
def test_nothing_installed(tmp_path):
    """A Python with click and nothing else."""
    import click

    venv.create(tmp_path / 'venv', symlinks=True)
    libraries = tmp_path / 'libraries'
    libraries.mkdir()
    (libraries / 'click').symlink_to(Path(click.__file__).parent)
    python = tmp_path / 'venv' / 'bin' / 'python'
    done = run_doctor('--json', path=libraries, cwd=tmp_path, python=python)
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)['findings']
    found = {finding['name']: finding for finding in findings}
    assert found['torch']['advice'] == '`pip install torch torchvision`'
    assert found['mmengine']['advice'] == '`pip install onedl-mmengine`'
    assert found['OpenCV']['advice'] == '`pip install opencv-python-headless`'
    assert found['detection']['advice'] == '`pip install onedl-mmdetection`'
    assert found['mmcv operators']['message'] == 'there is no mmcv in this environment'
    problems = [f['name'] for f in findings if f['state'] == 'problem']
    assert problems == ['torch', 'mmengine', 'OpenCV']


@pytest.mark.slow
def test_two_mmengines(tmp_path):
    """A distribution is what importlib.metadata finds."""
    for name in ('mmengine', 'opencv_python'):
        info = tmp_path / f'{name}-0.1.dist-info'
        info.mkdir()
        text = f'Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n'
        (info / 'METADATA').write_text(text)
    (tmp_path / 'torch.py').write_text('raise ImportError')  # to be quick
    done = run_doctor(path=tmp_path, cwd=tmp_path)
    verdict = done.stdout.splitlines()[-1]
    assert verdict == '3 problems: torch, mmengine, OpenCV'
