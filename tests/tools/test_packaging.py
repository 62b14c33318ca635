"""What is shipped: one version, and an sdist and a wheel that hold what they
should and work where this checkout is not."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import convnext_mm
from repo import ROOT

# What programs leave behind: no business of an sdist.
LITTER = (
    'tests/__pycache__/test_x.cpython-311.pyc',
    'tests/data/weights.pth',
    'tools/run.log',
    'convnext_mm/ops/__pycache__/lean.cpython-311.pyc',
    '.venv/lib/thing.py',
    '.mypy_cache/thing.json',
    'data/shapes/image.png',
    'work_dirs/demo/config.py',
    'wheels/other-1.0-py3-none-any.whl',
)
BUILDERS_OWN = re.compile(r'PKG-INFO|setup\.cfg|convnext_mm\.egg-info/.*')


def run(*command: object, **options) -> str:
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope='module')
def tracked() -> set[str]:
    """The files of the repository, new ones included."""
    if not (ROOT / '.git').exists():
        pytest.skip('not a checkout: what belongs to the repository is not known')
    listing = run(
        'git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z', cwd=ROOT
    )
    return {name for name in listing.split('\0') if name and (ROOT / name).is_file()}


@pytest.fixture(scope='module')
def built(tracked, tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    source = tmp_path_factory.mktemp('source')
    for name in (*tracked, *LITTER):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if name in tracked:
            shutil.copyfile(ROOT / name, source / name)
        else:
            (source / name).write_text('litter')
    out = tmp_path_factory.mktemp('dist')
    # Without isolation nothing is downloaded.
    options = ('--no-isolation', '--outdir', out)
    run(sys.executable, '-m', 'build', *options, source)
    return out


@pytest.fixture(scope='module')
def wheel(built) -> Path:
    (path,) = built.glob('*.whl')
    return path


def test_one_version(wheel):
    version = convnext_mm.__version__
    assert metadata.version('convnext-mm') == version  # else: run `make setup`
    assert wheel.name == f'convnext_mm-{version}-py3-none-any.whl'
    changelog = (ROOT / 'CHANGELOG.md').read_text()
    released = re.findall(r'^## \[(\d\S*)\]', changelog, re.MULTILINE)
    assert released[0] == version
    assert 'version' not in yaml.safe_load((ROOT / 'CITATION.cff').read_text())


def test_sdist_holds_the_repository(built, tracked):
    (path,) = built.glob('*.tar.gz')
    with tarfile.open(path) as file:
        names = {m.name.partition('/')[2] for m in file.getmembers() if m.isfile()}
    assert {n for n in names - tracked if not BUILDERS_OWN.fullmatch(n)} == set()
    assert tracked - names == set()


def test_wheel_holds_the_package_and_configs_alone(wheel, tracked):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        about = f'convnext_mm-{convnext_mm.__version__}.dist-info'
        licence = file.read(f'{about}/licenses/LICENSE').decode()
    package = {n for n in tracked if n.startswith('convnext_mm/')}
    package |= {f'convnext_mm/{n}' for n in tracked if n.startswith('configs/')}
    assert 'convnext_mm/py.typed' in package
    assert {n for n in names if not n.startswith(f'{about}/')} == package
    assert licence == (ROOT / 'LICENSE').read_text()


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith('.dist-info/METADATA'))
        found = Parser().parsestr(file.read(name).decode())
    assert found['License-Expression'] == 'Apache-2.0'
    assert found['Requires-Python'] == '>=3.10'
    assert found['Description-Content-Type'] == 'text/markdown'
    assert found.get_payload() == (ROOT / 'README.md').read_text()
    # Either would overwrite the other one.
    required = [r for r in found.get_all('Requires-Dist') if 'extra ==' not in r]
    assert not any('mmengine' in r or 'opencv' in r for r in required)


USE = """
import runpy
import sys
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

# A config's types resolve before anything has imported this package.
assert 'convnext_mm' not in sys.modules
assert OPTIM_WRAPPER_CONSTRUCTORS.get('convnext_mm.LayerDecayOptimWrapperConstructor')
net = MODELS.build(dict(type='convnext_mm.ConvNeXt', arch='atto'))

import torch
import convnext_mm

print([tuple(out.shape) for out in net(torch.rand(1, 3, 64, 64))])
print('imported', convnext_mm.__file__)
# python -m convnext_mm.datasets; one process, as importing PyTorch takes long.
sys.argv[1:] = ['shapes', '--train', '2', '--val', '1']
runpy.run_module('convnext_mm.datasets', run_name='__main__', alter_sys=True)
"""


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / 'site', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install')
    run(*pip, '--quiet', '--no-index', '--no-deps', '--target', target, wheel)
    options = dict(
        cwd=elsewhere,
        env={**os.environ, 'PYTHONPATH': str(target), 'PYTHONWARNINGS': 'ignore'},
    )
    said = run(sys.executable, '-c', USE, **options)
    assert '(1, 320, 2, 2)]' in said
    assert f'imported {target / "convnext_mm" / "__init__.py"}\n' in said
    command = (sys.executable, '-m', 'convnext_mm')
    assert str(target / 'convnext_mm/configs') in run(*command, 'configs', **options)
    said = run(*command, 'zoo', '--trained', **options)
    assert '48 recipes, 48 with trained weights' in said
    said = run(*command, 'flops', 'upernet_convnext-t', **options)
    assert re.search(r'total +│ +60.24 │ +938.5', said)
    assert len(list(elsewhere.glob('shapes/images/*/*.png'))) == 3


def test_citation():
    """What CITATION.cff must have, and the papers that the README names."""
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()
    readme = (ROOT / 'README.md').read_text()
    assert [len(paper['authors']) for paper in citation['references']] == [6, 7]
    assert all(paper['url'] in readme for paper in citation['references'])


def test_hooks_run_what_make_lint_runs():
    """But for the formatter, which mends instead of complaining."""
    config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
    lint = run('make', '--dry-run', 'lint', 'RUN=python', cwd=ROOT)
    (repository,) = config['repos']
    for hook in repository['hooks']:
        command = hook['entry'].removeprefix('.venv/bin/').split(' --')[0]
        assert command in lint
