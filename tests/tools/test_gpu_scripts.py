"""The scripts for a GPU machine, as far as a CPU can tell: they set up, run
every part, and say which one failed."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from repo import ROOT
from warm_python import warm_python


def bash(*command, **environment):
    return subprocess.run(
        ['bash', *map(str, command)],
        cwd=ROOT,
        text=True,
        timeout=540,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            'OMP_NUM_THREADS': '1',
            'PYTHON': sys.executable,
            **{name: str(value) for name, value in environment.items()},
        },
    )


def gpu_python(wheels, temporary, **environment):
    result = subprocess.run(
        [
            'bash',
            '-c',
            'source tools/maintenance/gpu_env.sh; gpu_python "$1"',
            '_',
            str(wheels),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            'PYTHON': sys.executable,
            'TMPDIR': str(temporary),
            **environment,
        },
    )
    return result.returncode, result.stdout.strip(), result.stderr


def write_wheel(folder, name, version='1.0', tag='py3-none-any'):
    """A wheel of one module that says its version."""
    folder.mkdir(exist_ok=True)
    info = f'{name}-{version}.dist-info'
    with zipfile.ZipFile(folder / f'{name}-{version}-{tag}.whl', 'w') as file:
        file.writestr(f'{name}.py', f'version = {version!r}\n')
        file.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n',
        )
        file.writestr(
            f'{info}/WHEEL',
            f'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n',
        )
        file.writestr(f'{info}/RECORD', '')


def test_without_wheels_python_is_used_as_it_is(tmp_path):
    status, python, said = gpu_python(tmp_path / 'none', tmp_path)
    assert (status, python) == (0, sys.executable)
    assert 'no folder' in said


def test_wheels_come_before_what_is_installed(tmp_path):
    """And all that is installed can still be imported, also from a virtual
    environment."""
    wheels = tmp_path / 'wheels'
    write_wheel(wheels, 'mat4py', '99.0')  # installed in another version
    write_wheel(wheels, 'of_another_python', tag='py3-none-any')
    write_wheel(wheels, 'of_another_python', '2.0', 'cp27-cp27m-win32')
    status, python, said = gpu_python(wheels, tmp_path)
    assert status == 0, said
    code = (
        'import mat4py, of_another_python, torch, mmengine, convnext_mm; '
        'print(mat4py.version, of_another_python.version, torch.__file__, '
        'convnext_mm.__file__)'
    )
    result = bash('-c', f'source tools/maintenance/gpu_env.sh; {python} -c "{code}"')
    import torch

    assert result.stdout.split()[-4:] == [
        '99.0',
        '1.0',
        torch.__file__,
        str(ROOT / 'convnext_mm' / '__init__.py'),
    ]
    made = os.stat(python).st_ino
    assert gpu_python(wheels, tmp_path)[:2] == (0, python)
    assert os.stat(python).st_ino == made  # the same again, not a new one


def test_wheels_that_do_not_fit_are_named(tmp_path):
    (tmp_path / 'empty').mkdir()
    status, _, said = gpu_python(tmp_path / 'empty', tmp_path)
    assert status == 1 and 'holds no wheel' in said and 'pack_wheels' in said
    write_wheel(tmp_path / 'other', 'alien', tag='cp27-cp27m-win32')
    status, python, said = gpu_python(tmp_path / 'other', tmp_path)
    assert status == 1 and not python and 'alien' in said
    status, _, said = gpu_python(tmp_path, tmp_path, PYTHON='no_such_python')
    assert status == 1 and "'no_such_python'; set PYTHON" in said


def test_arguments_of_the_proof(tmp_path):
    for arguments, message in [
        ((), 'usage: '),
        (('out', '--what'), "option '--what'"),
        (('out', '--wheels', tmp_path / 'none'), 'is no folder'),
    ]:
        result = bash('tools/maintenance/gpu_proof.sh', *arguments)
        assert result.returncode == 2 and message in result.stdout


def test_a_part_that_fails_is_told(tmp_path):
    """Without a usable Python nothing runs, and the summary says so."""
    (tmp_path / 'wheels').mkdir()
    result = bash(
        'tools/maintenance/gpu_proof.sh',
        tmp_path / 'out',
        '--smoke',
        '--wheels',
        tmp_path / 'wheels',
    )
    assert result.returncode == 1
    assert 'failed: environment (exit code 1)' in result.stdout
    summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
    assert summary['environment']['exit_code'] == 1
    assert 'see log.txt' in summary['environment']['reason']


def test_the_whole_proof_measures_everything(tmp_path):
    """The commands it gives, with nothing measured; one of them fails, and the
    others go on."""
    python, log = tmp_path / 'python', tmp_path / 'commands'
    python.write_text(
        '#!/usr/bin/env bash\n'
        f'case $1 in tools/*) echo "$@" >> {log} ;;\n'
        f'*) exec {warm_python()} "$@" ;; esac\n'
        'case $* in *detector*) exit 3 ;; esac\n'
    )
    python.chmod(0o755)
    out = tmp_path / 'out'
    result = bash('tools/maintenance/gpu_proof.sh', out, '--wheels', '', PYTHON=python)
    commands = [
        line for line in log.read_text().splitlines() if '/dev/null' not in line
    ]  # fills the compiler's cache
    runs = {
        line.rpartition('/')[2].removesuffix('.json'): line
        for line in commands
        if 'benchmark.py --device cuda' in line
    }
    for arch in ('tiny', 'base'):
        whole = runs[f'backbone_{arch}']
        assert '--size 800 1344 --mode train infer memory' in whole
        assert 'amp-fp16' in whole and '--networks' not in whole  # all peers
        assert '--size 512 512 --mode train' in runs[f'backbone_{arch}_crop']
        assert (
            '--compile mmpretrain timm torchvision transformers lean'
            in (runs[f'backbone_{arch}_compiled'])
        )
        assert (
            '--mode train --dtype amp --size 800 1344'
            in (runs[f'backbone_{arch}_compiled'])
        )
    assert commands[0] == f'tools/maintenance/check_kernels.py {out}'
    assert commands[-1].startswith('tools/benchmark.py --plot')
    summary = json.loads((out / 'summary.json').read_text())
    failed = {name for name, part in summary.items() if part['exit_code']}
    if 'detector' in runs:  # where mmcv's operators are
        for task in ('detector', 'segmentor'):
            assert f'--mode {task} --dtype amp --fit-gib 24 80' in runs[task]
        assert summary['detector']['exit_code'] == 3
        assert failed == {'detector'} and result.returncode == 1
    else:
        assert 'left out' in summary['detector']['reason']
        assert not failed and result.returncode == 0


@pytest.mark.slow
def test_smoke_run_of_the_proof(tmp_path):
    for package in ('mmcv.ops', 'mmdet', 'mmseg', 'mmpretrain', 'timm'):
        pytest.importorskip(package)
    out = tmp_path / 'out'
    result = bash(
        'tools/maintenance/gpu_proof.sh',
        out,
        '--smoke',
        '--wheels',
        '',
        PYTHON=warm_python(),
    )
    assert result.returncode == 0, result.stdout
    summary = json.loads((out / 'summary.json').read_text())
    parts = [
        'backbone_atto',
        'backbone_atto_crop',
        'detector',
        'segmentor',
        'backbone_atto_compiled',
    ]
    assert [*summary] == ['environment', 'kernels', *parts, 'plot']
    assert all(part['exit_code'] == 0 for part in summary.values())
    rows = {
        part: json.loads((out / f'{part}.json').read_text())['rows'] for part in parts
    }
    modes = {row['mode'] for row in rows['backbone_atto']}
    assert modes == {'train', 'infer', 'memory'}
    assert {row['network'] for row in rows['backbone_atto_compiled']} == {
        'timm',
        'timm compiled',
    }
    for part in ('detector', 'segmentor'):
        assert [row['network'] for row in rows[part]] == ['auto', 'mmpretrain']
    kernels = json.loads((out / 'kernels.json').read_text())['records']
    assert {r['check'].split()[0] for r in kernels} == {'block', 'downsample', 'norm'}
    assert all(r['ok'] for r in kernels)
    assert (out / 'plot.png').stat().st_size > 10_000
    assert '=== detector' in (out / 'log.txt').read_text()
