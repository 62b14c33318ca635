"""Makes .venv with everything the project needs, checks it, or says in one
sentence what is missing and how to get it. Standard library only: it runs
before anything is installed. A second run starts at once, and goes on where one
was interrupted.

From the environment (``make setup TORCH=2.11`` sets it):

- TORCH: which set of versions, requirements/torch-*.txt.
- TORCH_INDEX_URL: where PyTorch comes from, for a CPU build.
- MMCV=compiled: mmcv with its own compiled operators.
- VENV: the folder, .venv by default.

What is not given stays as it was chosen before."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / (os.environ.get('VENV') or '.venv')
PYTHON = VENV / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
# What was chosen, and of what .venv was made once it is complete.
STATE = VENV / 'convnext_mm-setup.json'
REQUIREMENTS = ROOT / 'requirements'
OPERATORS = ROOT / 'convnext_mm' / 'compat' / 'mmcv_ops'
# PyTorch 2.15 cannot be installed on Python 3.10.
TODAY, OLDER = '2.15', '2.11'
NEWEST = OLDER if sys.version_info < (3, 11) else TODAY
CHOICES = dict(TORCH=NEWEST, TORCH_INDEX_URL='', MMCV='torchvision')
CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
SUPPORTED = ((3, 10), (3, 13))
DISK_GIB = 8
BUILD_TOOLS = ('pip', 'setuptools', 'wheel', 'packaging')
MMCV = 'onedl-mmcv'
START = time.monotonic()
CHECK_ALL = (
    'import torch, torchvision, cv2, mmcv.ops, mmdet.models, '
    'mmseg.models, mmpretrain.models, convnext_mm; assert cv2.version.headless'
)
# An operator built without CUDA imports, and fails at its first call on a GPU.
CHECK_MMCV = """
import torch, mmcv.ops
device = 'cuda' if torch.cuda.is_available() else 'cpu'
mmcv.ops.nms(torch.rand(2, 4, device=device).cumsum(1),
             torch.rand(2, device=device), 0.5)
"""
CHECK_COMPILED = f"{CHECK_MMCV}assert not hasattr(mmcv._ext, 'say_once')"


class SetupError(Exception):
    """Something the user has to do first; the message is the advice."""


def main() -> int:
    try:
        check_python()
        choices = choose()
        state = read_state()
        if state.get('made_from') == fingerprint(choices) and PYTHON.exists():
            return 0
        check_disk()
        if choices['MMCV'] == 'compiled':
            check_compiler()
        check_folder()
        left_by_an_earlier_run = VENV.exists()
        drop_what_stays(choices)
        make_venv(choices)
        check_network()
        install(choices)
        try:
            verify()
        except SetupError:
            if not left_by_an_earlier_run:
                raise
            say('what an earlier run left cannot be mended: making it anew')
            shutil.rmtree(VENV)
            make_venv(choices)
            install(choices)
            verify()
    except SetupError as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f'\nset-up stopped: {error}. Free disk, or give yourself the folder, and '
            'run the command again.',
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print('\nset-up stopped. The same command goes on.', file=sys.stderr)
        return 130
    write_state({**choices, 'made_from': fingerprint(choices)})
    print(f'set-up is complete: {VENV.name} is ready ({since_start()})')
    return 0


def choose() -> dict[str, str]:
    """What is asked for, what was chosen before, or the default."""
    state = read_state()
    choices = {
        name: os.environ.get(name) or state.get(name) or default
        for name, default in CHOICES.items()
    }
    sets = [path.stem.removeprefix('torch-') for path in REQUIREMENTS.glob('torch-*')]
    if choices['TORCH'] not in sets:
        raise SetupError(
            f'there are no proven versions for TORCH={choices["TORCH"]}: take one of '
            f'{", ".join(sorted(sets))}.'
        )
    if choices['TORCH'] == TODAY != NEWEST:
        raise SetupError(
            f'PyTorch {TODAY} needs Python 3.11 or later, and this is 3.10: take '
            f'`make setup TORCH={OLDER}`, or another Python with PYTHON=python3.12.'
        )
    if choices['MMCV'] not in ('torchvision', 'compiled'):
        raise SetupError(
            f'MMCV={choices["MMCV"]} is neither `torchvision` (operators that need no '
            'compiler, the default) nor `compiled` (its own).'
        )
    return choices


def read_state() -> dict[str, str]:
    try:
        state = json.loads(STATE.read_text())
    except (OSError, ValueError):  # none, or cut off
        return {}
    return state if isinstance(state, dict) else {}


def write_state(state: dict[str, str]) -> None:
    STATE.write_text(json.dumps(state))


def fingerprint(choices: dict[str, str]) -> str:
    """What .venv was made from: another one means that it is out of date."""
    digest = hashlib.sha256(f'{sys.version} {ROOT} {choices}'.encode())
    for path in (
        constraints(choices),
        REQUIREMENTS / 'common.txt',
        ROOT / 'setup.cfg',
        ROOT / 'convnext_mm' / 'version.py',  # is in the installed metadata
        OPERATORS / '__main__.py',
        OPERATORS / 'operators.py',
        Path(__file__),
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_python(version=None) -> None:
    version = version or sys.version_info[:2]
    lowest, highest = ('.'.join(map(str, v)) for v in SUPPORTED)
    if not SUPPORTED[0] <= tuple(version) <= SUPPORTED[1]:
        raise SetupError(
            f'this is Python {version[0]}.{version[1]}, and set-up is proven '
            f'with {lowest} to {highest}: install one and run '
            f'`make PYTHON=python{highest} ...`.'
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            'this Python has no venv module: install it, on Debian and Ubuntu '
            'with `apt-get install python3-venv`.'
        ) from error


def check_folder() -> None:
    """VENV may name any folder, and what is there is replaced."""
    ours = VENV == ROOT / '.venv' or STATE.exists()
    if VENV.exists() and not ours and (not VENV.is_dir() or any(VENV.iterdir())):
        raise SetupError(
            f'VENV={VENV} is there already and was not made by set-up: name a new '
            'folder, or none for .venv.'
        )


def check_disk(free: float | None = None) -> None:
    if _succeeds('import torch, torchvision'):  # the bulk of it is there
        return
    if free is None:
        free = shutil.disk_usage(ROOT).free / 2**30
    if free < DISK_GIB:
        raise SetupError(
            f'{ROOT} has {free:.1f} GiB of free disk and set-up needs '
            f'{DISK_GIB}: free some, or clone the project elsewhere.'
        )


def check_compiler() -> None:
    compiler = os.environ.get('CXX', 'c++')
    if not (shutil.which(compiler) or shutil.which('g++')):
        raise SetupError(
            'there is no C++ compiler, which MMCV=compiled needs: install one,'
            ' on Debian and Ubuntu with `apt-get install g++`, or '
            '`make setup MMCV=torchvision`.'
        )
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        raise SetupError(
            f'the Python headers are missing ({header}), which MMCV=compiled '
            'needs: install them, on Debian and Ubuntu with `apt-get install '
            'python3-dev`, or `make setup MMCV=torchvision`.'
        )


def check_network() -> None:
    """Fetches the smallest pinned package, before the long part."""
    with tempfile.TemporaryDirectory() as folder:
        quick = ('--no-deps', '--no-cache-dir', '--timeout', '15', '--retries', '1')
        result = subprocess.run(
            [*pip('download'), *quick, '--dest', folder, pinned('wheel')],
            capture_output=True,
            text=True,
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise SetupError(
            "pip cannot reach its package index: check the network, or pip's "
            f'proxy and index settings (`pip config list`). pip said: {reason}'
        )


def make_venv(choices: dict[str, str]) -> None:
    version = f'assert sys.version_info[:2] == {tuple(sys.version_info[:2])}'
    if not _succeeds(f'import pip._internal.cli.main, sys; {version}'):
        say(f'making {VENV.name}')
        shutil.rmtree(VENV, ignore_errors=True)
        run(
            [sys.executable, '-m', 'venv', VENV],
            f'making {VENV.name} failed: see the message above.',
        )
    write_state(choices)
    # What a pip that was killed leaves, and would take for installed.
    packages = next(iter(VENV.glob('lib/python*/site-packages')), VENV)
    for path in packages.glob('*.dist-info'):
        if not (path / 'RECORD').exists():
            shutil.rmtree(path)
    for path in packages.glob('~*'):
        shutil.rmtree(path, ignore_errors=True)


def drop_what_stays(choices: dict[str, str]) -> None:
    """What pip would take for what is asked for now: operators compiled for another
    PyTorch, or no longer wanted, and a PyTorch of another index."""
    before, names = read_state(), []
    same = all(before.get(name) == choices[name] for name in ('TORCH', 'MMCV'))
    if not same and any(VENV.glob('lib/python*/site-packages/mmcv/_ext.*')):
        names.append(MMCV)
    if before.get('TORCH_INDEX_URL', '') != choices['TORCH_INDEX_URL']:
        names += ['torch', 'torchvision']
    # Without pip make_venv starts anew, and nothing stays.
    if names and _succeeds('import pip._internal.cli.main'):
        run(
            [*pip('uninstall'), '--yes', *names],
            f'removing {", ".join(names)} failed: delete {VENV.name} and run again.',
        )


def install(choices: dict[str, str]) -> None:
    step('1/4 pip and what builds packages', 10)
    pip_install(choices, *map(pinned, BUILD_TOOLS))
    step("2/4 mmcv's Python files, with operators that need no compiler", 5)
    run(
        [PYTHON, OPERATORS / '__main__.py', '--no-deps', '--no-try'],
        'installing mmcv failed: the message above says why; run the command again '
        'once it is mended.',
    )
    size = '3 GB'
    if choices['TORCH_INDEX_URL']:
        size = f'from {choices["TORCH_INDEX_URL"]}'
    elif not has_nvidia():
        print(
            'This machine has no NVIDIA GPU. For a CPU build of PyTorch, without 3 GB '
            f'of CUDA, stop this and `make setup TORCH_INDEX_URL={CPU_INDEX}`.'
        )
    step(f'3/4 PyTorch {choices["TORCH"]} ({size}) and everything else', 90)
    if choices['TORCH_INDEX_URL']:
        # Alone: an index of PyTorch may have nothing else.
        index = ('--index-url', choices['TORCH_INDEX_URL'], '--no-deps')
        pip_install(choices, *index, 'torch', 'torchvision')
    pip_install(
        choices,
        *('torch', 'torchvision'),
        *('--editable', f'{ROOT}[det,seg,hub,export,docs,parity,dev]'),
    )
    step('4/4 OpenCV without a display, and a last look', 15)
    # mmseg needs opencv-python, others opencv-python-headless; both write cv2/, and
    # a server has no libGL, so the headless files must be the last.
    headless = pinned('opencv-python-headless')
    pip_install(choices, '--force-reinstall', '--no-deps', headless)
    if choices['MMCV'] == 'compiled':
        compile_mmcv(choices)


def compile_mmcv(choices: dict[str, str]) -> None:
    """mmcv from its source archive with its own operators, by the C++ standard
    that PyTorch asks for; its set-up would name an older one."""
    if _succeeds(CHECK_COMPILED):
        return
    say('compiling mmcv: 10 minutes or more on 2 cores')
    log = VENV / 'mmcv-build.log'
    with tempfile.TemporaryDirectory() as folder:
        pip_install(choices, *map(pinned, ('ninja', 'psutil')))
        arguments = ('--no-deps', '--no-binary', MMCV, '--dest', folder, pinned(MMCV))
        run(
            [*pip('download'), '--no-build-isolation', *arguments],
            f'downloading {pinned(MMCV)} failed: see the message above.',
        )
        (archive,) = Path(folder).glob('*.tar.gz')
        with tarfile.open(archive) as file:
            file.extractall(folder)
        source = archive.with_name(archive.name.removesuffix('.tar.gz'))
        script = source / 'setup.py'
        script.write_text(script.read_text().replace('c++17', 'c++20'))
        build(source, log)
    if not _succeeds(CHECK_COMPILED, show=True):
        raise SetupError(
            f'{pinned(MMCV)} was built but its operators fail: see the error above. '
            '`make setup MMCV=torchvision` does without them.'
        )


def build(source: Path, log: Path) -> None:
    """Builds and installs with a progress line."""
    env = {'MAX_JOBS': str(os.cpu_count()), **os.environ}
    options = ('--verbose', '--no-deps', '--force-reinstall', '--no-build-isolation')
    with (
        log.open('w') as file,
        subprocess.Popen(
            [*pip('install'), *options, source],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            env=env,
        ) as process,
    ):
        start = time.time()
        for line in process.stdout:
            file.write(line)
            found = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if found:
                done, total = int(found[1]), int(found[2])
                left = (time.time() - start) / done * (total - done) / 60
                end = '\n' if done == total else ''
                # The first ones wait for others.
                when = f', {left:.0f} minutes left ' if done > 5 else ''
                print(f'\rcompiling mmcv {done}/{total}{when}', end=end, flush=True)
    if process.returncode:
        tail = ''.join(log.open(errors='replace').readlines()[-30:])
        raise SetupError(
            f'{tail}\nbuilding mmcv failed; the log is {log}. '
            '`make setup MMCV=torchvision` does without compiled operators.'
        )


def verify() -> None:
    if not _succeeds(CHECK_ALL, show=True):
        raise SetupError(
            'the packages were installed but do not import: '
            f'delete {VENV.name} and try again; if it persists, report '
            'the error above.'
        )


def has_nvidia() -> bool:
    return Path('/dev/nvidiactl').exists() or bool(shutil.which('nvidia-smi'))


def constraints(choices: dict[str, str]) -> Path:
    return REQUIREMENTS / f'torch-{choices["TORCH"]}.txt'


def pinned(name: str) -> str:
    """``name==version`` of what all sets share."""
    text = (REQUIREMENTS / 'common.txt').read_text()
    match = re.search(rf'^{re.escape(name)}==\S+', text, re.MULTILINE)
    return match[0] if match else name


def pip(command: str) -> list:
    return [PYTHON, '-m', 'pip', '--disable-pip-version-check', command]


def pip_install(choices: dict[str, str], *arguments: str) -> None:
    run(
        [
            *pip('install'),
            '--no-build-isolation',
            *('--constraint', constraints(choices)),
            *arguments,
        ],
        f'installing {" ".join(arguments)} failed: '
        "pip's message above says why; run the command again once it is mended.",
    )


def run(command: list, advice: str) -> None:
    if subprocess.run(command).returncode:
        raise SetupError(advice)


def _succeeds(code: str, show: bool = False) -> bool:
    output = None if show else subprocess.DEVNULL
    if not Path(PYTHON).exists():
        return False
    return (
        subprocess.run(
            [PYTHON, '-W', 'ignore', '-c', code],
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd=tempfile.gettempdir(),
        ).returncode
        == 0
    )


def step(message: str, seconds: int) -> None:
    say(f'{message}: about {seconds} s on 2 cores once downloaded ({since_start()})')


def since_start() -> str:
    return f'{time.monotonic() - START:.0f} s so far'


def say(message: str) -> None:
    print(f'\n=== {message}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
