"""The scripts for a GPU machine, as far as a CPU can tell: they set up, run
every part, and say which one failed."""

import itertools
import json
import os
import subprocess
import sys
import time
import zipfile

import pytest

import gpu_proof
from convnext_mm.apis.benchmark import Settings
from repo import ROOT

QUICK = dict(PYTHONPATH=ROOT / 'tests/helpers/quick_programs')


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
        (('--wheels', ''), 'the following arguments are required: OUT'),
        (('out', '--what'), 'unrecognized arguments: --what'),
        (('out', '--wheels', tmp_path / 'none'), 'is no folder'),
    ]:
        result = bash('tools/maintenance/gpu_proof.sh', *arguments)
        assert result.returncode == 2 and message in result.stdout


def test_without_a_usable_python(tmp_path):
    (tmp_path / 'wheels').mkdir()
    result = bash(
        'tools/maintenance/gpu_proof.sh',
        tmp_path / 'out',
        '--smoke',
        '--wheels',
        tmp_path / 'wheels',
    )
    assert result.returncode == 1
    assert 'holds no wheel' in result.stdout


def test_what_the_proof_measures():
    parts = {part.name: part for group in gpu_proof.proof() for part in group}
    assert len(parts) == sum(map(len, gpu_proof.proof()))
    order = [*parts]
    for earlier, later in itertools.pairwise(
        (
            *('check_tiny_train_amp_0', 'backbone_tiny_amp', 'detector_tiny_amp_x2'),
            *('segmentor_tiny_amp_x2', 'backbone_tiny_bf16', 'backbone_base_amp'),
            *('backbone_tiny_fp16', 'backbone_tiny_fp32'),
        )
    ):
        assert order.index(earlier) < order.index(later)
    timed = [part for part in parts.values() if part.kind == 'bench']
    for part in timed:
        settings = {
            k: v for k, v in part.settings.items() if k not in ('fit', 'fit_gib')
        }
        Settings(**settings)  # refuses what does not go together
        assert 'auto' not in part.settings['networks']  # which says not what ran
    cases = {(p.settings['batch'], tuple(p.settings.get('size', ()))) for p in timed}
    assert {(2, (800, 1344)), (16, (512, 512))} <= cases
    looking = [p for p in timed if p.settings['mode'][0].endswith('-infer')]
    assert {p.settings['mode'][0] for p in looking if p.settings['batch'] > 1} == {
        p.settings['mode'][0] for p in looking if p.settings['batch'] == 1
    }
    kernels = [part.settings for part in parts.values() if part.kind == 'kernels']
    assert {96, 192, 384, 768, 128, 1024} <= {case['shape'][1] for case in kernels}


def test_every_candidate_is_checked():
    pytest.importorskip('triton')
    from convnext_mm.ops.triton import launch

    choices = [len(launch.STRIPS), len(launch.SUM_TILES) + 1]
    choices += [len(tiles) + 1 for tiles in launch.PRODUCT_TILES.values()]
    assert max(choices) == gpu_proof.CANDIDATES


# A worker that does what its settings say, without PyTorch.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
order = json.loads(sys.stdin.readline() or 'null')
if order is None:
    sys.exit()
out, settings = Path(order['out']), order['settings']
result = dict(rows=[], skipped={}, running=None)
def save():
    part = out.with_suffix('.part')
    try:
        part.write_text(json.dumps(result))
    except FileNotFoundError:  # the test is over
        sys.exit()
    os.replace(part, out)
for name in settings['networks']:
    result['running'] = f'{name}, train, amp'
    save()
    if name == 'crashes':
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == 'hangs':
        time.sleep(600)
    if name == 'falls back':
        result['skipped'][f'{name}, train, amp'] = 'triton was asked for, and lean ran'
        continue
    time.sleep(settings.get('pause', 0))
    result['rows'].append(dict(network=name, mode='train', dtype='amp', median_ms=1.0))
    save()
if settings.get('raises'):
    out.with_suffix('.reason').write_text('RuntimeError: in the end')
    sys.exit(1)
result['running'] = None
save()
"""


def part(name, networks, **settings):
    return gpu_proof.Part(
        name, 'bench', dict(mode=['train'], networks=networks, **settings)
    )


@pytest.fixture
def proof(tmp_path):
    script = tmp_path / 'worker.py'
    script.write_text(WORKER)
    (tmp_path / 'scratch').mkdir()
    with open(tmp_path / 'log.txt', 'w') as log:
        made = gpu_proof.Proof(
            *(tmp_path / 'proof.json', log, {}, dict(os.environ)),
            *(tmp_path / 'scratch', 30, (sys.executable, '-IS', str(script))),
        )
        yield made
        made.close()


def parts_of(proof):
    return json.loads(proof.out.read_text())['parts']


def networks_of(result):
    return [row['network'] for row in result['rows']]


def test_a_network_that_crashes_or_hangs_costs_only_itself(proof, monkeypatch):
    monkeypatch.setattr(gpu_proof, 'STALL_S', 1)
    names = ['first', 'crashes', 'second', 'hangs', 'third']
    proof.run([[part('one', names)], [part('two', ['other'])]], workers=1)
    results = parts_of(proof)
    assert networks_of(results['one']) == ['first', 'second', 'third']
    assert results['one']['failed'] == dict(
        crashes='signal 11, see log.txt', hangs='did nothing for 1 s'
    )
    assert results['two']['status'] == 'done'
    assert networks_of(results['two']) == ['other']


def test_a_part_that_raises_keeps_its_rows(proof):
    proof.run(
        [[part('one', ['first'], raises=True), part('two', ['other'])]], workers=2
    )
    results = parts_of(proof)
    assert results['one']['status'] == 'failed'
    assert networks_of(results['one']) == ['first']
    assert results['one']['failed'] == {'first': 'RuntimeError: in the end'}
    assert results['two']['status'] == 'done'


def test_a_fallback_is_no_result_of_ours(proof):
    proof.run([[part('one', ['falls back', 'other'])]], workers=1)
    result = parts_of(proof)['one']
    assert networks_of(result) == ['other']
    assert 'lean ran' in result['failed']['falls back, train, amp']


def test_without_time_parts_are_not_reached(proof, monkeypatch):
    proof.end = time.monotonic() + 1
    proof.run([[part('one', ['first', 'hangs'])], [part('two', ['other'])]], workers=1)
    results = parts_of(proof)
    assert networks_of(results['one']) == ['first']
    assert results['one']['failed'] == {'hangs': 'no time was left'}
    assert results['two']['status'] == 'not reached'


def test_several_at_once_have_no_times(proof):
    checked = part('one', ['first'])
    checked.kind = 'check'
    proof.run([[checked, part('two', ['other'])]], workers=2)
    results = parts_of(proof)
    assert 'median_ms' not in results['one']['rows'][0]
    assert 'median_ms' in results['two']['rows'][0]


def test_killed_midway_the_file_holds_what_was_measured(tmp_path):
    """With the rows of the part that was running."""
    worker, script = tmp_path / 'worker.py', tmp_path / 'script.py'
    worker.write_text(WORKER)
    script.write_text(
        'import os, sys\n'
        'from pathlib import Path\n'
        f'sys.path.insert(0, {str(ROOT / "tools/maintenance")!r})\n'
        'from gpu_proof import Part, Proof\n'
        f'out = Path({str(tmp_path)!r})\n'
        "slow = dict(mode=['train'], networks=[*'abcdefgh'], pause=0.5)\n"
        "proof = Proof(out / 'proof.json', None, {}, dict(os.environ), out, 60,\n"
        f"              (sys.executable, '-IS', {str(worker)!r}))\n"
        "proof.run([[Part('one', 'bench', slow)]], 1)\n"
    )
    running = subprocess.Popen([sys.executable, '-IS', script])
    out, rows = tmp_path / 'proof.json', []
    end = time.monotonic() + 30
    while len(rows) < 2 and time.monotonic() < end:
        time.sleep(0.05)
        if out.exists():  # valid whenever it is read
            rows = json.loads(out.read_text())['parts']['one'].get('rows', [])
    running.kill()
    running.wait()
    result = json.loads(out.read_text())['parts']['one']
    assert networks_of(result)[:2] == ['a', 'b'] and result['status'] == 'running'


@pytest.mark.slow
def test_smoke_run_of_the_proof(tmp_path):
    for package in ('mmcv.ops', 'mmdet', 'mmseg', 'mmpretrain', 'timm'):
        pytest.importorskip(package)
    out = tmp_path / 'out'
    result = bash(
        *('tools/maintenance/gpu_proof.sh', out, '--smoke', '--wheels', ''), **QUICK
    )
    assert result.returncode == 0, result.stdout + (out / 'log.txt').read_text()
    assert {path.name for path in out.iterdir()} == {'proof.json', 'log.txt'}
    parts = json.loads((out / 'proof.json').read_text())['parts']
    assert {part['status'] for part in parts.values()} == {'done'}
    ran = {
        name: {row['network']: row['implementation'] for row in part['rows']}
        for name, part in parts.items()
        if 'rows' in part
    }
    assert ran == {
        'check_tiny_train_amp_0': dict(triton='triton'),
        'compile_tiny_timm': dict(lean='lean', timm='plain'),
        'backbone_tiny_amp': dict(lean='lean', timm='plain'),
        'detector_tiny_amp_x2': dict(lean='lean', mmpretrain='plain'),
        'segmentor-infer_tiny_amp_x8': {
            'lean': 'lean',
            'lean+deploy': 'lean',
            'resnet50': 'plain',
        },
    }
    records = parts['kernels_96_float32']['records']
    assert {r['check'].split()[0] for r in records} == {'block', 'downsample', 'norm'}
    assert all(r['ok'] for r in records)
    assert len({r['candidate'] for r in records}) > 1


@pytest.mark.slow
def test_smoke_run_of_the_tuning(tmp_path):
    result = bash(
        *('tools/maintenance/gpu_proof.sh', tmp_path, '--smoke', '--tune'),
        *('--only', 'tune', '--wheels', ''),
        **QUICK,
    )
    assert result.returncode == 0, result.stdout
    parts = json.loads((tmp_path / 'tune.json').read_text())['parts']
    (tuned,) = parts.values()
    assert all(
        set(candidate) == {'candidate', 'ms'}
        for record in tuned['records']
        for candidate in record['candidates']
    )
    assert any(len(record['candidates']) > 1 for record in tuned['records'])
