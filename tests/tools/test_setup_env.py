"""What set-up refuses, in one sentence with the fix."""

import re
import sys
from configparser import ConfigParser
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from repo import ROOT, load_tool, run


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    module = load_tool('setup_env')
    monkeypatch.setattr(module, 'VENV', tmp_path)
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PYTHON', sys.executable)
    monkeypatch.delenv('CONVNEXT_MM_WHEELS', raising=False)
    return module


@pytest.mark.parametrize(
    'version, good',
    [((3, 9), False), ((3, 10), True), ((3, 12), True), ((3, 13), False)],
)
def test_python_version(setup_env, version, good):
    if good:
        setup_env.check_python(version)
        return
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.check_python(version)
    for word in (f'{version[0]}.{version[1]}', '3.10 to 3.12', 'make PYTHON='):
        assert word in str(caught.value)


def test_disk(setup_env):
    setup_env.check_disk(8.1)
    with pytest.raises(setup_env.SetupError, match='7.9 GiB.*needs 8'):
        setup_env.check_disk(7.9)


def test_compiler(setup_env, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_env.shutil, 'which', lambda name: None)
    with pytest.raises(setup_env.SetupError, match=r'C\+\+.*install g\+\+'):
        setup_env.check_compiler()
    # A prebuilt wheel makes the compiler unnecessary.
    folder = tmp_path / 'wheels'
    folder.mkdir()
    (folder / 'onedl_mmcv-2.3.6-cp39-cp39-win_amd64.whl').touch()
    with pytest.raises(setup_env.SetupError):
        setup_env.check_compiler()
    tag = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    platform = f'{sys.platform}_x86_64'
    (folder / f'onedl_mmcv-2.3.6-{tag}-{tag}-{platform}.whl').touch()
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
    with pytest.raises(setup_env.SetupError, match='cannot reach.*network'):
        setup_env.check_network()


def test_a_second_run_starts_at_once(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, 'fingerprint', lambda: 'made from this')
    monkeypatch.setattr(setup_env, 'READY', setup_env.VENV / 'ready')
    monkeypatch.setattr(setup_env, 'check_python', lambda: None)
    monkeypatch.setattr(setup_env, '_succeeds', lambda code: False)
    called = []
    for step in (
        'check_disk',
        'check_compiler',
        'make_venv',
        'check_network',
        'install',
        'verify',
    ):
        monkeypatch.setattr(setup_env, step, lambda step=step: called.append(step))
    assert setup_env.main() == 0 and len(called) == 6
    assert setup_env.main() == 0 and len(called) == 6


@pytest.mark.parametrize('name', ['setup.cfg', 'convnext_mm/version.py', 'pins'])
def test_what_makes_an_environment_out_of_date(setup_env, monkeypatch, tmp_path, name):
    monkeypatch.setattr(setup_env, 'CONSTRAINTS', tmp_path / 'pins')
    (tmp_path / 'convnext_mm').mkdir()
    for path in ('setup.cfg', 'convnext_mm/version.py', 'pins'):
        (tmp_path / path).write_text('before')
    before = setup_env.fingerprint()
    assert setup_env.fingerprint() == before
    (tmp_path / name).write_text('after')
    assert setup_env.fingerprint() != before


def test_a_stale_mmcv_is_built_again(setup_env, monkeypatch):
    """The first build comes from pip's cache and does not import."""
    builds, imports = [], iter([False, False, True])
    monkeypatch.setattr(setup_env, '_succeeds', lambda code, show=False: next(imports))
    monkeypatch.setattr(
        setup_env, 'build_mmcv', lambda *options: builds.append(options)
    )
    monkeypatch.setattr(setup_env.subprocess, 'run', lambda *a, **k: None)
    setup_env.install_mmcv()
    assert builds == [(), ('--force-reinstall', '--no-deps', '--no-cache-dir')]


def test_errors_end_the_command(setup_env, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'READY', setup_env.VENV / 'ready')
    monkeypatch.setattr(setup_env, 'PYTHON', setup_env.VENV / 'none')
    monkeypatch.setattr(
        setup_env.shutil, 'disk_usage', lambda path: type('Usage', (), dict(free=2**30))
    )
    assert setup_env.main() == 1
    assert 'set-up stopped' in capsys.readouterr().err


def test_the_environment_is_what_set_up_promises():
    code = (
        'import cv2, mmcv.ops, mmdet.models, mmseg.models\nassert cv2.version.headless'
    )
    run(sys.executable, '-W', 'ignore', '-c', code)


def test_all_pins_are_found(setup_env):
    for name in (
        *setup_env.BUILD_TOOLS,
        setup_env.MMCV,
        'torch',
        'torchvision',
        'opencv-python-headless',
    ):
        assert setup_env.pinned(name).startswith(f'{name}==')


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
    lines = (ROOT / 'requirements' / 'constraints.txt').read_text().splitlines()
    pins = {
        canonical(line.partition('==')[0]) for line in lines if not line.startswith('#')
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
    needed |= {'setuptools', 'wheel', 'ninja', 'psutil', 'packaging'}  # to build
    needed |= {'opencv-python-headless'}
    for name in sorted(needed):
        extras = {e for r in direct if canonical(r.name) == name for e in r.extras}
        needed |= requirements_of(name, tuple(sorted(extras))).keys()
    # PyTorch's wheel requires them by their exact versions itself.
    needed = {n for n in needed if not n.startswith(('nvidia-', 'cuda-'))}
    assert pins == needed
