"""What set-up does and refuses, in one sentence with the fix."""

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from repo import ROOT, load_tool, run

CHOICES = dict(TORCH='2.15', TORCH_INDEX_URL='', MMCV='torchvision')


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 11, 7, 'final', 0))
    for name in (*CHOICES, 'VENV', 'CXX'):
        monkeypatch.delenv(name, raising=False)
    module = load_tool('setup_env')
    monkeypatch.setattr(module, 'VENV', tmp_path / 'venv')
    monkeypatch.setattr(module, 'STATE', tmp_path / 'venv' / 'state.json')
    monkeypatch.setattr(module, 'PYTHON', Path(sys.executable))
    module.VENV.mkdir()
    return module


@pytest.mark.parametrize(
    'version, good',
    [((3, 9), False), ((3, 10), True), ((3, 12), True), ((3, 15), False)],
)
def test_python_version(setup_env, version, good):
    if good:
        setup_env.check_python(version)
        return
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.check_python(version)
    highest = '.'.join(map(str, setup_env.SUPPORTED[1]))
    for word in (f'{version[0]}.{version[1]}', f'3.10 to {highest}', 'make PYTHON='):
        assert word in str(caught.value)


def test_disk(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, '_succeeds', lambda code: False)
    setup_env.check_disk(8.1)
    with pytest.raises(setup_env.SetupError, match='7.9 GiB.*needs 8'):
        setup_env.check_disk(7.9)
    monkeypatch.setattr(setup_env, '_succeeds', lambda code: True)
    setup_env.check_disk(0.1)  # PyTorch is there already


def test_compiler(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: None)
    with pytest.raises(
        setup_env.SetupError, match=r'C\+\+.*install g\+\+.*MMCV=torchvision'
    ):
        setup_env.check_compiler()


def test_headers(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: name)
    monkeypatch.setattr(
        setup_env.sysconfig, 'get_paths', lambda: dict(include=str(tmp_path))
    )
    with pytest.raises(setup_env.SetupError, match='python3-dev'):
        setup_env.check_compiler()


def test_network(setup_env, monkeypatch):
    for name in ('HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    for name in ('PIP_FIND_LINKS', 'PIP_EXTRA_INDEX_URL'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(setup_env.SetupError, match='cannot reach.*network'):
        setup_env.check_network()


# What is chosen


@pytest.mark.parametrize(
    'name, value, message',
    [
        ('TORCH', '2.10', 'TORCH=2.10: take one of 2.11, 2.15'),
        ('MMCV', 'yes', 'MMCV=yes is neither `torchvision`.*nor `compiled`'),
    ],
)
def test_choices_that_do_not_exist(setup_env, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(setup_env.SetupError, match=message):
        setup_env.choose()


def test_python_310_gets_the_older_set(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'version_info', (3, 10, 13, 'final', 0))
    monkeypatch.setenv('VENV', str(tmp_path / 'none'))
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    module = load_tool('setup_env')
    assert module.choose()['TORCH'] == '2.11'
    monkeypatch.setenv('TORCH', '2.15')
    with pytest.raises(module.SetupError, match='needs Python 3.11.*TORCH=2.11'):
        module.choose()


def test_what_was_chosen_stays(setup_env, monkeypatch):
    assert setup_env.choose() == CHOICES
    monkeypatch.setenv('TORCH', '2.11')
    older = {**CHOICES, 'TORCH': '2.11'}
    assert setup_env.choose() == older
    setup_env.write_state(older)
    monkeypatch.delenv('TORCH')
    assert setup_env.choose() == older
    monkeypatch.setenv('TORCH', '2.15')
    assert setup_env.choose() == CHOICES
    setup_env.STATE.write_text('{"TORCH": "2.')  # written when the disk was full
    monkeypatch.delenv('TORCH')
    assert setup_env.choose() == CHOICES


STEPS = (
    'check_disk',
    'check_folder',
    'drop_what_stays',
    'make_venv',
    'check_network',
    'install',
)


@pytest.fixture
def steps(setup_env, monkeypatch):
    """Steps that do nothing, and a list of those taken."""
    called = []
    for step in (*STEPS, 'verify'):
        monkeypatch.setattr(
            setup_env, step, lambda *arguments, step=step: called.append(step)
        )
    return called


def test_a_second_run_starts_at_once(setup_env, steps, monkeypatch):
    assert setup_env.main() == 0 and steps == [*STEPS, 'verify']
    assert setup_env.main() == 0 and len(steps) == 7
    monkeypatch.setenv('TORCH', '2.11')  # another set
    assert setup_env.main() == 0 and len(steps) == 14
    monkeypatch.delenv('TORCH')
    assert setup_env.main() == 0 and len(steps) == 14


@pytest.mark.parametrize('step', [*STEPS, 'verify'])
def test_interrupted_at_any_step_it_goes_on(
    setup_env, steps, monkeypatch, step, capsys
):
    works = getattr(setup_env, step)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, step, interrupted)
    assert setup_env.main() == 130
    assert 'The same command goes on' in capsys.readouterr().err
    monkeypatch.setattr(setup_env, step, works)
    steps.clear()
    assert setup_env.main() == 0 and steps == [*STEPS, 'verify']


def test_what_cannot_be_mended_is_made_anew(setup_env, steps, monkeypatch):
    def broken_at_first():
        steps.append('verify')
        if steps.count('verify') == 1:
            raise setup_env.SetupError('does not import')

    (setup_env.VENV / 'leftover').touch()
    # What remakes the folder is one of the steps that do nothing here.
    monkeypatch.setattr(
        setup_env, 'make_venv', lambda choices: setup_env.VENV.mkdir(exist_ok=True)
    )
    monkeypatch.setattr(setup_env, 'verify', broken_at_first)
    assert setup_env.main() == 0
    assert steps.count('install') == 2
    assert not (setup_env.VENV / 'leftover').exists()


def test_a_new_environment_that_fails_is_not_made_again(
    setup_env, steps, monkeypatch, capsys
):
    setup_env.VENV.rmdir()

    def fails():
        raise setup_env.SetupError('does not import')

    monkeypatch.setattr(setup_env, 'verify', fails)
    assert setup_env.main() == 1 and steps.count('install') == 1
    assert capsys.readouterr().err.strip() == 'set-up stopped: does not import'


def test_a_full_disk_is_said(setup_env, steps, monkeypatch, capsys):
    def full(choices):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(setup_env, 'make_venv', full)
    assert setup_env.main() == 1
    error = capsys.readouterr().err
    assert 'No space left' in error and 'Free disk' in error


def test_what_a_killed_pip_leaves_goes(setup_env):
    packages = setup_env.VENV / 'lib' / 'python3.11' / 'site-packages'
    for name in ('whole-1.0.dist-info', 'half-1.0.dist-info', '~orch'):
        (packages / name).mkdir(parents=True)
    (packages / 'whole-1.0.dist-info' / 'RECORD').touch()
    setup_env.make_venv(CHOICES)  # PYTHON is one that has pip
    assert [path.name for path in packages.iterdir()] == ['whole-1.0.dist-info']
    assert json.loads(setup_env.STATE.read_text()) == CHOICES


@pytest.mark.parametrize('name', ['setup.cfg', 'version', 'pins', 'operators'])
def test_what_makes_an_environment_out_of_date(setup_env, monkeypatch, tmp_path, name):
    paths = {
        'pins': tmp_path / 'requirements' / 'torch-2.15.txt',
        'common': tmp_path / 'requirements' / 'common.txt',
        'setup.cfg': tmp_path / 'setup.cfg',
        'version': tmp_path / 'convnext_mm' / 'version.py',
        'operators': tmp_path / 'operators' / 'operators.py',
        'command': tmp_path / 'operators' / '__main__.py',
    }
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text('before')
    monkeypatch.setattr(setup_env, 'ROOT', tmp_path)
    monkeypatch.setattr(setup_env, 'REQUIREMENTS', tmp_path / 'requirements')
    monkeypatch.setattr(setup_env, 'OPERATORS', tmp_path / 'operators')
    before = setup_env.fingerprint(CHOICES)
    assert setup_env.fingerprint(CHOICES) == before
    paths[name].write_text('after')
    assert setup_env.fingerprint(CHOICES) != before


# What is installed


@pytest.fixture
def commands(setup_env, monkeypatch):
    """The commands that would run, all of which succeed."""
    ran = []

    def record(command, **options):
        ran.append(' '.join(map(str, command[1:])))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(setup_env, 'subprocess', SimpleNamespace(run=record))
    monkeypatch.setattr(setup_env, 'has_nvidia', lambda: False)
    monkeypatch.setattr(setup_env, '_succeeds', lambda code: True)
    return ran


def test_a_machine_without_gpu_is_told_of_the_cpu_build(setup_env, commands, capsys):
    setup_env.install(CHOICES)
    assert 'TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu' in (
        capsys.readouterr().out
    )
    assert not any('--index-url' in command for command in commands)


def test_pytorch_comes_from_the_index_that_is_named(setup_env, commands, capsys):
    setup_env.install({**CHOICES, 'TORCH_INDEX_URL': 'https://here/cpu'})
    (command,) = [c for c in commands if '--index-url https://here/cpu' in c]
    assert command.endswith('torch torchvision')
    assert f'--constraint {ROOT}/requirements/torch-2.15.txt' in command
    # Before anything that needs PyTorch would bring another.
    whole = next(c for c in commands if '--editable' in c)
    assert commands.index(command) < commands.index(whole)
    assert 'no NVIDIA GPU' not in capsys.readouterr().out


@pytest.mark.parametrize(
    'after, gone',
    [(dict(MMCV='torchvision'), True), (dict(TORCH='2.11'), True), ({}, False)],
)
def test_operators_compiled_for_something_else_go(setup_env, commands, after, gone):
    before = {**CHOICES, 'MMCV': 'compiled'}
    setup_env.write_state(before)
    folder = setup_env.VENV / 'lib' / 'python3.11' / 'site-packages' / 'mmcv'
    folder.mkdir(parents=True)
    (folder / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
    setup_env.drop_what_stays({**before, **after})
    assert any('uninstall --yes onedl-mmcv' in command for command in commands) is gone


def test_a_pytorch_of_another_index_goes(setup_env, commands):
    setup_env.write_state(CHOICES)
    setup_env.drop_what_stays(CHOICES)
    assert not commands
    setup_env.drop_what_stays({**CHOICES, 'TORCH_INDEX_URL': 'https://here'})
    assert commands[0].endswith('uninstall --yes torch torchvision')


def test_an_environment_without_pip_is_left_to_the_next_step(
    setup_env, commands, monkeypatch
):
    monkeypatch.setattr(setup_env, '_succeeds', lambda code: False)
    setup_env.drop_what_stays({**CHOICES, 'TORCH_INDEX_URL': 'https://here'})
    assert not commands


def test_a_folder_of_somebody_else_is_never_touched(setup_env, capsys):
    (setup_env.VENV / 'thesis.tex').touch()
    assert setup_env.main() == 1
    assert 'was not made by set-up: name a new folder' in capsys.readouterr().err
    assert [path.name for path in setup_env.VENV.iterdir()] == ['thesis.tex']


def test_no_name_is_the_default(monkeypatch):
    monkeypatch.setenv('VENV', '')
    assert load_tool('setup_env').VENV == ROOT / '.venv'


def test_a_failed_download_leaves_what_works(setup_env, steps, monkeypatch, capsys):
    (setup_env.VENV / 'works').touch()
    setup_env.write_state(CHOICES)

    def fails(choices):
        raise setup_env.SetupError('installing failed')

    monkeypatch.setattr(setup_env, 'install', fails)
    assert setup_env.main() == 1
    assert (setup_env.VENV / 'works').exists()


@pytest.mark.parametrize('fails', ['pip install', 'mmcv_ops', 'pip install --force'])
def test_a_failed_step_is_named(setup_env, commands, monkeypatch, fails):
    def failing(command, **options):
        text = ' '.join(map(str, command))
        bad = all(word in text for word in fails.split())
        return SimpleNamespace(returncode=int(bad))

    monkeypatch.setattr(setup_env.subprocess, 'run', failing)
    with pytest.raises(setup_env.SetupError, match='installing .* failed.*run .*again'):
        setup_env.install(CHOICES)


def test_errors_end_the_command(setup_env, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'PYTHON', setup_env.VENV / 'none')
    monkeypatch.setattr(
        setup_env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**30)
    )
    assert setup_env.main() == 1
    assert 'set-up stopped' in capsys.readouterr().err


def test_the_environment_is_what_set_up_promises():
    code = (
        'import cv2, mmcv.ops, mmdet.models, mmseg.models\nassert cv2.version.headless'
    )
    run(sys.executable, '-W', 'ignore', '-c', code)


@pytest.mark.parametrize('variable', ['VENV', 'TORCH', 'TORCH_INDEX_URL', 'MMCV'])
def test_make_hands_on_what_is_chosen(variable, tmp_path):
    """With a Python that prints what it is given."""
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\necho "[${variable}]"\n')
    python.chmod(0o755)
    command = ['make', '--no-print-directory', '-C', ROOT, 'setup', f'PYTHON={python}']
    result = subprocess.run(
        [*command, f'{variable}=that'], capture_output=True, text=True, check=True
    )
    assert result.stdout == '[that]\n'


def test_all_pins_are_found(setup_env):
    for name in (
        *setup_env.BUILD_TOOLS,
        setup_env.MMCV,
        *('ninja', 'psutil', 'opencv-python-headless'),
    ):
        assert setup_env.pinned(name).startswith(f'{name}==')
    sets = {p.stem: p.read_text() for p in setup_env.REQUIREMENTS.glob('torch-*.txt')}
    for name, text in sets.items():
        assert f'torch=={name.removeprefix("torch-")}.' in text
        assert '-c common.txt' in text.splitlines()
    assert f'torch-{setup_env.CHOICES["TORCH"]}' in sets


def canonical(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def requirements_of(name: str, extras: tuple = ()) -> dict[str, Requirement]:
    """What a distribution needs, directly and by what that needs."""
    found, waiting, seen = {}, [(name, extras)], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        name, extras = current
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({'extra': extra}) for extra in (*extras, '')
            ):
                found[canonical(needed.name)] = needed
                waiting.append((needed.name, tuple(sorted(needed.extras))))
    return found


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason='the pins are for 3.11')
def test_the_pins_are_all_and_only_what_is_needed():
    """Another set would be installed on another day."""
    pins = {
        canonical(line.partition('==')[0])
        for name in ('common.txt', 'torch-2.15.txt')
        for line in (ROOT / 'requirements' / name).read_text().splitlines()
        if not line.startswith(('#', '-c'))
    }
    setup = ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    direct = [
        Requirement(line)
        for value in (
            setup['options']['install_requires'],
            *setup['options.extras_require'].values(),
        )
        for line in value.splitlines()
        if line and not line.startswith('#')
    ]
    needed = {canonical(requirement.name) for requirement in direct}
    needed |= {'pip', 'setuptools', 'wheel', 'packaging', 'opencv-python-headless'}
    for name in sorted(needed):
        extras = {e for r in direct if canonical(r.name) == name for e in r.extras}
        needed |= requirements_of(name, tuple(sorted(extras))).keys()
    needed |= {'ninja', 'psutil'}  # of MMCV=compiled alone; they need nothing
    # PyTorch's wheel requires them by their exact versions itself.
    needed = {n for n in needed if not n.startswith(('nvidia-', 'cuda-'))}
    assert pins == needed
