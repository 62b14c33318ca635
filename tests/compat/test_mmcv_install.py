"""How the operators get into an environment's mmcv, and out of it."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip('mmcv')
import mmcv

from convnext_mm.compat import mmcv_ops
from convnext_mm.compat.mmcv_ops import __main__ as installer
from repo import ROOT

COMMAND = (sys.executable, ROOT / 'convnext_mm' / 'compat' / 'mmcv_ops' / '__main__.py')


@pytest.fixture
def site(tmp_path):
    """A folder with mmcv's Python files and their metadata, as from a wheel."""
    site = tmp_path / 'site'
    ignored = shutil.ignore_patterns('_ext*', '__pycache__', 'csrc')
    shutil.copytree(Path(mmcv.__file__).parent, site / 'mmcv', ignore=ignored)
    info = site / 'onedl_mmcv-2.3.6.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Name: onedl-mmcv\nVersion: 2.3.6\n')
    (info / 'RECORD').write_text(
        'mmcv/__init__.py,,\nonedl_mmcv-2.3.6.dist-info/RECORD,,\n'
    )
    return site


@pytest.fixture
def here(site, monkeypatch):
    """The installer of this process, for that folder; every program succeeds."""
    monkeypatch.setattr(installer, 'mmcv_folder', lambda: site / 'mmcv')
    monkeypatch.setattr(installer, 'fault_of', lambda code, *arguments: None)
    monkeypatch.setattr(
        installer.metadata,
        'distributions',
        lambda: metadata.MetadataPathFinder.find_distributions(
            metadata.DistributionFinder.Context(path=[str(site)])
        ),
    )
    monkeypatch.setattr(
        installer.metadata,
        'distribution',
        lambda name: next(iter(installer.metadata.distributions())),
    )
    return site / 'mmcv'


def content(folder):
    """Every file, but for what Python compiles."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }


def run(*command, site, check=True):
    env = {**os.environ, 'PYTHONPATH': str(site), 'PYTHONWARNINGS': 'ignore'}
    env.pop('TRITON_INTERPRET', None)
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
def test_mmdet_imported_first_gets_the_operators(site):
    before = content(site)
    program = (sys.executable, '-c', 'import mmdet.models, mmcv; print(mmcv.__file__)')
    failed = run(*program, site=site, check=False)
    assert failed.returncode and "No module named 'mmcv._ext'" in failed.stderr
    assert 'operators on torchvision are in' in run(*COMMAND, site=site).stdout
    assert str(site / 'mmcv') in run(*program, site=site).stdout
    assert 'are gone' in run(*COMMAND, '--remove', site=site).stdout
    assert content(site) == before


@pytest.mark.slow
def test_operators_compiled_for_another_pytorch_are_covered(site):
    suffix = installer.EXTENSION_SUFFIXES[0]
    broken = site / 'mmcv' / f'_ext{suffix}'
    broken.write_bytes(b'\x7fELF' + bytes(100))
    assert 'do not import (ImportError' in run(*COMMAND, '--status', site=site).stdout
    run(*COMMAND, site=site)
    program = 'import mmcv.ops, sys; print(sys.modules["mmcv._ext"].__file__)'
    found = run(sys.executable, '-c', program, site=site).stdout.strip()
    assert found == str(site / 'mmcv' / '_ext' / '__init__.py')
    assert broken.exists()


def test_once_more_changes_nothing(here, capsys):
    assert installer.main([]) == 0
    before = content(here.parent)
    assert installer.main([]) == 0
    assert content(here.parent) == before
    record = (here.parent / 'onedl_mmcv-2.3.6.dist-info' / 'RECORD').read_text()
    assert record.count('mmcv/_ext/__init__.py,sha256=') == 1


def test_those_of_another_version_are_brought_up_to_date(here, capsys):
    place = here / '_ext' / '__init__.py'
    place.parent.mkdir()
    place.write_text(installer.MARK + '\n"""')
    assert 'another version' in installer.status()
    assert installer.main([]) == 0
    assert place.read_bytes() == installer.SOURCE.read_bytes()
    assert installer.status() == f'operators on torchvision are in {here}.'


def test_status_of_every_mmcv(here, monkeypatch):
    assert 'has no operators' in installer.status()
    (here / f'_ext{installer.EXTENSION_SUFFIXES[0]}').touch()
    assert 'compiled operators' in installer.status()
    monkeypatch.setattr(installer, 'mmcv_folder', lambda: None)
    assert 'no mmcv' in installer.status()


def test_operators_that_import_are_never_touched(here, capsys):
    (here / f'_ext{installer.EXTENSION_SUFFIXES[0]}').touch()
    before = content(here.parent)
    assert installer.main([]) == 0
    assert 'left as they are' in capsys.readouterr().out
    assert content(here.parent) == before


def test_without_pytorch_nothing_can_be_judged(here, monkeypatch, capsys):
    (here / f'_ext{installer.EXTENSION_SUFFIXES[0]}').touch()
    monkeypatch.setattr(installer, 'fault_of', lambda *code: "No module named 'torch'")
    assert installer.main([]) == 1
    assert 'install PyTorch first' in capsys.readouterr().err


def test_a_package_of_somebody_else_stays(here, capsys):
    place = here / '_ext' / '__init__.py'
    place.parent.mkdir()
    place.write_text('theirs = 1')
    assert installer.main([]) == 1
    assert 'is not of convnext_mm: move it away' in capsys.readouterr().err
    assert installer.main(['--remove']) == 0
    assert place.read_text() == 'theirs = 1'


@pytest.mark.parametrize(
    'error', [OSError(28, 'No space left on device'), PermissionError(13, 'Denied')]
)
def test_a_file_that_cannot_be_written_leaves_nothing(here, monkeypatch, capsys, error):
    before = content(here.parent)

    def fails(path, data):
        with path.open('wb') as file:
            file.write(data[:10])
        raise error

    monkeypatch.setattr(installer.Path, 'write_bytes', fails)
    assert installer.main([]) == 1
    assert 'Free disk, or run this as the owner' in capsys.readouterr().err
    assert content(here.parent) == before and not (here / '_ext').exists()


def test_an_editable_mmcv(here, capsys):
    """Its distribution lists a link, and the files lie elsewhere."""
    record = here.parent / 'onedl_mmcv-2.3.6.dist-info' / 'RECORD'
    record.write_text('__editable___onedl_mmcv_finder.py,,\n')
    assert installer.main([]) == 0 and (here / '_ext' / '__init__.py').exists()
    assert installer.main(['--remove']) == 0 and not (here / '_ext').exists()
    assert record.read_text() == '__editable___onedl_mmcv_finder.py,,\n'


def test_what_is_missing_to_import_them_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr(installer, 'find_spec', lambda name: None)
    assert installer.main([]) == 0
    assert 'mmcv needs torch, torchvision, mmengine, cv2' in capsys.readouterr().out


def test_operators_that_do_not_work_are_an_error(here, monkeypatch, capsys):
    monkeypatch.setattr(installer, 'fault_of', lambda *code: 'ImportError: numpy 3')
    assert installer.main([]) == 1
    assert 'do not work: ImportError: numpy 3' in capsys.readouterr().err


# Where there is no mmcv


@pytest.fixture
def empty(here, monkeypatch):
    """No mmcv until pip installs one; the commands that pip was given."""
    commands = []

    def run_pip(*arguments, env=None):
        commands.append(arguments)
        if arguments[0] == 'wheel':
            folder = Path(arguments[arguments.index('--wheel-dir') + 1])
            (folder / 'mmcv-1-py3-none-any.whl').touch()
            assert 'setuptools<81' in Path(env['PIP_CONSTRAINT']).read_text()
            assert env['PIP_BUILD_CONSTRAINT'] == env['PIP_CONSTRAINT']
            assert 'PIP_NO_BUILD_ISOLATION' not in env
        if arguments[0] == 'uninstall':
            shutil.rmtree(here)

    installed = iter([None])
    monkeypatch.setenv('PIP_NO_BUILD_ISOLATION', '1')
    monkeypatch.setattr(installer, 'run_pip', run_pip)
    monkeypatch.setattr(installer, 'mmcv_folder', lambda: next(installed, here))
    return commands


def name_distributions(monkeypatch, *names):
    distributions = installer.metadata.distributions
    found = [SimpleNamespace(name=name) for name in names]
    calls = iter([found])
    monkeypatch.setattr(
        installer.metadata,
        'distributions',
        lambda: next(calls, None) or distributions(),
    )


@pytest.mark.parametrize(
    'others, wanted',
    [
        ((), 'onedl-mmcv==2.3.6'),
        (('onedl-mmengine', 'mmdet'), 'onedl-mmcv==2.3.6'),
        (('mmengine', 'mmdet', 'torch'), 'mmcv==2.1.0'),
    ],
)
def test_mmcv_is_installed_and_removed_again(empty, here, monkeypatch, others, wanted):
    name_distributions(monkeypatch, *others)
    assert installer.main(['--no-deps']) == 0
    (wheel, install) = empty
    assert wheel[-1] == wanted and '--no-cache-dir' in wheel
    assert install[1] == '--no-deps' and install[2].endswith('-none-any.whl')
    assert (here / '_ext' / '__init__.py').exists()
    assert installer.main(['--remove']) == 0
    assert empty[-1] == ('uninstall', '--yes', 'onedl-mmcv') and not here.exists()


def test_an_mmcv_of_another_environment_is_not_said_to_be_gone(
    empty, here, monkeypatch, capsys
):
    assert installer.main([]) == 0
    # pip says so, and ends well.
    monkeypatch.setattr(installer, 'run_pip', lambda *arguments: None)
    assert installer.main(['--remove']) == 1
    assert "run this with that one's Python" in capsys.readouterr().err
    assert (here / '_ext' / '__init__.py').exists()


def test_a_wheel_that_was_compiled_is_refused(empty, monkeypatch, capsys):
    def run_pip(*arguments, env=None):
        folder = Path(arguments[arguments.index('--wheel-dir') + 1])
        (folder / 'mmcv-1-cp311-cp311-linux_x86_64.whl').touch()

    monkeypatch.setattr(installer, 'run_pip', run_pip)
    assert installer.main([]) == 1
    assert 'remove no-build-isolation' in capsys.readouterr().err


def test_without_network_pip_is_quoted(monkeypatch):
    for name in ('HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_RETRIES', '0')
    for name in ('PIP_FIND_LINKS', 'PIP_EXTRA_INDEX_URL'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(installer.OperatorsError, match='`pip wheel` failed.*network'):
        installer.install_mmcv()


def test_pip_that_is_missing_is_quoted(monkeypatch):
    monkeypatch.setattr(
        installer.subprocess,
        'run',
        lambda *a, **k: SimpleNamespace(
            returncode=1, stderr='python: No module named pip', stdout=''
        ),
    )
    with pytest.raises(installer.OperatorsError, match='No module named pip'):
        installer.run_pip('install', 'x')


def test_this_environments_operators_are_of_this_version():
    pytest.importorskip('mmcv.ops')
    if not mmcv_ops.in_use():
        pytest.skip('this mmcv has compiled operators')
    place = Path(sys.modules['mmcv._ext'].__file__)
    assert place.read_bytes() == installer.SOURCE.read_bytes(), 'run `make setup`'
