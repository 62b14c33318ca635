"""Proves with which versions the package works: makes an environment for each row
of ROWS, runs the core tests in it, and trains a detector and a segmentor for one
step on the CPU, each in a process that imports their library first.

    python tools/maintenance/prove_versions.py                     # every row: an hour
    python tools/maintenance/prove_versions.py --rows 1 3 --python 3.11=/path/python

Writes benchmarks/versions.json and the table of docs/installation.md. Rows that are
not run keep their results. An environment takes 8 GB while its row runs."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / 'benchmarks' / 'versions.json'
PAGE = ROOT / 'docs' / 'installation.md'
MARKS = '<!-- tools/maintenance/prove_versions.py -->', '<!-- end -->'
ROOMS = 'models ops engine checkpoint compat test_registry.py'.split()
TESTS = [f'tests/{room}' for room in ROOMS]
PYTEST = '-m|not slow|-n|2|--dist|loadfile|-p|no:cacheprovider'.split('|')
CONSOLE = Console(highlight=False, markup=False)
TODAY, BEFORE = ('torch-2.15.txt', 'common.txt'), ('torch-2.11.txt', 'common.txt')
ONEDL = '{}[det,seg,hub,parity]'
# What the extras would bring, by the names of the original distributions.
ORIGINAL = (
    '{}[hub] mmengine mmcv mmdet mmsegmentation mmpretrain timm transformers ftfy regex'
)
# These need NumPy 1, as the original mmcv and mmdet do.
NUMPY_1 = 'numpy<2 opencv-python<4.12 opencv-python-headless<4.12 transformers<4.49'


class Row(NamedTuple):
    """An environment: what is installed and with which versions."""

    python: str
    pinned_by: tuple[str, ...]  # files of requirements/
    versions: str = ''  # these instead of the files'
    packages: str = ONEDL


ROWS = {
    1: Row('3.11', TODAY),
    2: Row('3.11', BEFORE),
    3: Row('3.11', ('common.txt',), 'torch==2.4.1 torchvision==0.19.1'),
    4: Row('3.10', BEFORE),
    5: Row('3.12', TODAY),
    6: Row('3.13', TODAY),
    7: Row(
        '3.11',
        (),
        'torch==2.11.0 torchvision==0.26.0 mmengine==0.10.7 mmcv==2.1.0 mmdet==3.3.0 '
        f'mmsegmentation==1.2.2 mmpretrain==1.2.0 {NUMPY_1}',
        ORIGINAL,
    ),
    8: Row(
        '3.11',
        TODAY,
        'transformers>=5 tokenizers huggingface_hub',
        '{}[det,seg,hub] onedl-mmpretrain timm transformers',
    ),
}
OPENMMLAB = re.compile(
    '(onedl-)?mm(engine|cv|det|detection|seg|segmentation|pretrain)', re.IGNORECASE
)
OTHERS = ('torch', 'torchvision', 'numpy', 'transformers')
KEPT = (*OTHERS, 'triton', 'timm')

# In a new process, whose first import is the library. What draws the data and takes
# the step is what the tests have.
DOOR = """
import {library}.models
import math
import sys
from {library}.registry import MODELS
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

cfg = Config.fromfile('{config}')
init_default_scope('{library}')
if '{library}' == 'mmseg':
    cfg.model.data_preprocessor.size = (64, 64)
model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
assert type(model.backbone).__module__.startswith('convnext_mm.')
sys.path[:0] = 'tests/models', 'tests/helpers'
from test_heads import losses_of
losses = losses_of(model, cfg)
assert losses and all(map(math.isfinite, losses.values())), losses
"""
DOORS = {
    'mmdet': 'mask_rcnn/mask-rcnn_convnext-t_fpn_8xb2-amp-ms-crop-3x_coco.py',
    'mmseg': 'upernet/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
}


class RowError(Exception):
    """Why a row has no result, in one sentence."""


class Environment:
    """A virtual environment and a copy of what the repository holds, so that
    nothing is left in it and its files may change meanwhile."""

    def __init__(self, folder: Path, python: str, row: Row) -> None:
        self.folder, self.source, self.row = folder, folder / 'source', row
        files = ('git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard')
        listed = subprocess.run(files, cwd=ROOT, capture_output=True, text=True).stdout
        for name in filter(lambda name: (ROOT / name).is_file(), listed.split('\0')):
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, self.source / name)
        constraints = folder / 'constraints.txt'
        constraints.write_text('\n'.join(self.constraints()))
        shared = os.environ.get('CONVNEXT_MM_SHARED', str(ROOT.parent / 'shared'))
        self.env = dict(
            os.environ,
            PIP_CONSTRAINT=str(constraints),
            PIP_DISABLE_PIP_VERSION_CHECK='1',
            OMP_NUM_THREADS='1',
            CONVNEXT_MM_SHARED=shared,
        )
        self.env.pop('PYTHONPATH', None)
        self.must([python, '-m', 'venv', folder / 'venv'], 'venv')
        self.python = folder / 'venv' / 'bin' / 'python'

    def constraints(self) -> list[str]:
        """The files' lines, but for what the row has in another version."""
        own = self.row.versions.split()
        names = {re.split('[=<>]', line)[0] for line in own}
        for file in self.row.pinned_by:
            for line in (ROOT / 'requirements' / file).read_text().splitlines():
                if re.match('[A-Za-z]', line) and line.split('==')[0] not in names:
                    own.append(line)
        return [line for line in own if re.search('[=<>]', line)]

    def run(self, command: list) -> subprocess.CompletedProcess:
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        options = dict(cwd=self.source, env=self.env, text=True, errors='replace')
        return subprocess.run(list(map(str, command)), **pipes, **options)

    def must(self, command: list, what: str) -> str:
        done = self.run(command)
        if done.returncode:
            lines = done.stdout.strip().splitlines() or ['no reason given']
            errors = [line for line in lines if 'ERROR' in line] or lines[-1:]
            raise RowError(f'{what} failed: {self.clean(errors[0])}')
        return done.stdout

    def pip(self, *arguments: str) -> str:
        return self.must([self.python, '-m', 'pip', *arguments], f'pip {arguments[0]}')

    def install(self) -> None:
        """As a user without a compiler does: mmcv before what would compile it.
        OpenCV without a display last, as both kinds write the same files."""
        install = partial(self.pip, 'install', '--no-compile')
        install('--upgrade', 'pip')
        install('torch', 'torchvision')
        if self.row.packages is ORIGINAL:  # by it our command knows which mmcv
            install('--no-deps', 'mmengine')
        command = 'convnext_mm/compat/mmcv_ops/__main__.py'
        self.must([self.python, command, '--no-deps'], 'installing mmcv')
        packages = self.row.packages.format(self.source).split()
        tests = ('pytest', 'pytest-xdist', 'opencv-python-headless')
        install(*tests, '--editable', *packages, 'torch', 'torchvision')
        install('--force-reinstall', '--no-deps', 'opencv-python-headless')

    def versions(self) -> dict[str, str]:
        found = json.loads(self.pip('list', '--format', 'json').splitlines()[0])
        found = {item['name']: item['version'] for item in found}
        kept = {n: v for n, v in found.items() if n in KEPT or OPENMMLAB.fullmatch(n)}
        python = self.must([self.python, '--version'], 'Python').split()[-1]
        return dict(python=python, **kept)

    def test(self) -> dict:
        """How many tests passed, and which did not, with the error's first line."""
        report = self.folder / 'tests.xml'
        junit = f'--junitxml={report}'
        said = self.run([self.python, '-m', 'pytest', '-q', *TESTS, *PYTEST, junit])
        if not report.exists():
            last = said.stdout.strip().splitlines()[-1:]
            raise RowError(f'pytest did not run: {self.clean("".join(last))}')
        result = dict(passed=0, skipped=0, failed=0, errors={})
        for case in ElementTree.parse(report).iter('testcase'):
            faults = [part for part in case if part.tag in ('failure', 'error')]
            for fault in faults[:1]:
                name = f'{case.get("classname")}::{case.get("name")}'
                message = (fault.get('message') or '').split('\n')[0]
                result['errors'][name] = self.clean(message)[:120]
            skipped = not faults and case.find('skipped') is not None
            result['failed' if faults else 'skipped' if skipped else 'passed'] += 1
        return result

    def door(self, library: str) -> str:
        config = f'configs/{DOORS[library]}'
        program = DOOR.format(library=library, config=config)
        done = self.run([self.python, '-W', 'ignore', '-c', program])
        return self.clean(done.stdout.splitlines()[-1]) if done.returncode else 'works'

    def clean(self, line: str) -> str:
        """Without what is of this machine only: folders."""
        line = line.replace(f'{self.source}/', '')
        return re.sub(r'(?<![\w.])(/[\w.+-]+)+/', '', line).strip()


def prove(environment: Environment) -> dict:
    """The result of a row."""
    result, seconds = {}, {}
    steps = dict(
        install=environment.install,
        versions=environment.versions,
        **{library: partial(environment.door, library) for library in DOORS},
        tests=environment.test,
    )
    for name, step in steps.items():
        start = time.time()
        with CONSOLE.status(f'  {name} ...'):
            result[name] = step()
        seconds[name] = round(time.time() - start)
        CONSOLE.print(f'  {name}: {seconds[name]} s', result[name] or '')
    return dict(result, seconds=seconds)


def table(results: dict[str, dict]) -> str:
    heads = ['Python', 'PyTorch', 'torchvision', 'NumPy', 'transformers', 'OpenMMLab']
    heads.append('core tests passed / skipped / failed')
    heads += [f'`import {library}.models`, then a step' for library in DOORS]
    rows = [heads, ['---'] * len(heads)]
    for result in results.values():
        if 'error' in result:
            row = result['row']
            rows.append([row['python'], row['versions'], *[''] * 4, result['error']])
            continue
        versions, tests = result['versions'], result['tests']
        mm = (f'{n} {v}' for n, v in versions.items() if OPENMMLAB.fullmatch(n))
        row = [versions.get(name, '') for name in ('python', *OTHERS)]
        counts = (str(tests[name]) for name in ('passed', 'skipped', 'failed'))
        row += [', '.join(mm), ' / '.join(counts)]
        rows.append([*row, *(result[library] for library in DOORS)])
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def write(results: dict[str, dict]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + '\n')
    text = PAGE.read_text()
    pattern = f'{re.escape(MARKS[0])}\n.*?{re.escape(MARKS[1])}'
    filled = '\n'.join((MARKS[0], table(results), MARKS[1]))
    text, count = re.subn(pattern, lambda _: filled, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f'error: {PAGE.name} needs {" and ".join(MARKS)} once')
    PAGE.write_text(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rows', type=int, nargs='+', choices=ROWS, default=[*ROWS])
    parser.add_argument(
        '--python', nargs='+', default=[], metavar='X.Y=PATH', help='interpreters'
    )
    parser.add_argument('--keep', action='store_true', help='keep the environments')
    args = parser.parse_args(arguments)
    pythons = dict(item.partition('=')[::2] for item in args.python)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    status = 0
    for number in args.rows:
        row = ROWS[number]
        CONSOLE.print(f'row {number}: Python {row.python} {row.versions}', style='bold')
        folder = Path(tempfile.mkdtemp(prefix=f'prove_versions_{number}_'))
        try:
            try:
                python = shutil.which(pythons.get(row.python, f'python{row.python}'))
                if python is None:
                    raise RowError(f'there is no python{row.python}: use --python')
                result = prove(Environment(folder, python, row))
                if result['tests']['failed'] or {result[d] for d in DOORS} != {'works'}:
                    status = 1
            except RowError as error:
                result, status = dict(error=str(error)), 1
                CONSOLE.print(f'row {number} has no result: {error}', style='red')
            results[str(number)] = dict(row=row._asdict(), **result)
            write(dict(sorted(results.items())))
        finally:
            if args.keep:
                CONSOLE.print(f'  kept: {folder}')
            else:
                shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == '__main__':
    sys.exit(main())
