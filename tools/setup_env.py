"""Makes .venv with everything the project needs, checks it, or says in one
sentence what is missing and how to get it. Standard library only: it runs
before anything is installed. A second run starts at once."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
READY = VENV / '.convnext_mm-ready'
CONSTRAINTS = ROOT / 'requirements' / 'constraints.txt'
SUPPORTED = ((3, 10), (3, 12))
DISK_GIB = 8
# What builds the source archives: installed first, outside of isolation,
# because mmcv's build must see the torch it is built for.
BUILD_TOOLS = ('setuptools', 'wheel', 'ninja', 'psutil', 'packaging')
MMCV = 'onedl-mmcv'
# An operator built without CUDA imports, and fails at its first call on a GPU.
CHECK_MMCV = """
import torch, mmcv.ops
device = 'cuda' if torch.cuda.is_available() else 'cpu'
mmcv.ops.nms(torch.rand(2, 4, device=device).cumsum(1),
             torch.rand(2, device=device), 0.5)
"""
CHECK_ALL = (
    'import torch, torchvision, cv2, mmcv.ops, mmdet.models, '
    'mmseg.models, mmpretrain.models, convnext_mm'
)


class SetupError(Exception):
    """Something the user has to do first; the message is the advice."""


def main() -> int:
    try:
        check_python()
        if READY.exists() and READY.read_text() == fingerprint():
            return 0
        if not _succeeds('import torch, torchvision'):  # the bulk of it
            check_disk()
        check_compiler()
        make_venv()
        check_network()
        install()
        verify()
    except SetupError as error:
        print(f'\nset-up stopped: {error}', file=sys.stderr)
        return 1
    READY.write_text(fingerprint())
    print('set-up is complete: .venv is ready')
    return 0


def fingerprint() -> str:
    """What .venv was made from: another one means that it is out of date."""
    digest = hashlib.sha256(f'{sys.version} {ROOT}'.encode())
    version = ROOT / 'convnext_mm' / 'version.py'  # is in the installed metadata
    for path in (CONSTRAINTS, ROOT / 'setup.cfg', version, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_python(version=None) -> None:
    version = version or sys.version_info[:2]
    lowest, highest = ('.'.join(map(str, v)) for v in SUPPORTED)
    if not SUPPORTED[0] <= tuple(version) <= SUPPORTED[1]:
        raise SetupError(
            f'this is Python {version[0]}.{version[1]}, and the pinned '
            f'packages need {lowest} to {highest}: install one and run '
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


def check_disk(free: float | None = None) -> None:
    if free is None:
        free = shutil.disk_usage(ROOT).free / 2**30
    if free < DISK_GIB:
        raise SetupError(
            f'{ROOT} has {free:.1f} GiB of free disk and set-up needs '
            f'{DISK_GIB}: free some, or clone the project elsewhere.'
        )


def check_compiler() -> None:
    """A compiler is needed where no prebuilt mmcv wheel can be tried."""
    if prebuilt_wheels():
        return
    compiler = os.environ.get('CXX', 'c++')
    if not (shutil.which(compiler) or shutil.which('g++')):
        raise SetupError(
            'there is no C++ compiler, which building mmcv needs: install one,'
            ' on Debian and Ubuntu with `apt-get install g++`, or put a wheel '
            f'of {pinned(MMCV)} for this Python and torch into wheels/.'
        )
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        raise SetupError(
            f'the Python headers are missing ({header}), which building mmcv '
            'needs: install them, on Debian and Ubuntu with `apt-get install '
            'python3-dev`.'
        )


def check_network() -> None:
    """Fetches the smallest pinned package, before the long part."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                PYTHON,
                '-m',
                'pip',
                'download',
                '--quiet',
                '--no-deps',
                '--no-cache-dir',
                '--timeout',
                '15',
                '--retries',
                '1',
                '--dest',
                folder,
                pinned('packaging'),
            ],
            capture_output=True,
            text=True,
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise SetupError(
            "pip cannot reach its package index: check the network, or pip's "
            f'proxy and index settings (`pip config list`). pip said: {reason}'
        )


def make_venv() -> None:
    version = f'assert sys.version_info[:2] == {tuple(sys.version_info[:2])}'
    if not _succeeds(f'import pip, sys; {version}'):
        say('making .venv')
        shutil.rmtree(VENV, ignore_errors=True)
        run(
            [sys.executable, '-m', 'venv', VENV],
            'making .venv failed: see the message above.',
        )


def install() -> None:
    say('1/4 build tools')
    pip_install(*map(pinned, BUILD_TOOLS))
    say('2/4 PyTorch (about 5 GB)')
    pip_install(pinned('torch'), pinned('torchvision'))
    say('3/4 mmcv with its compiled ops')
    install_mmcv()
    say('4/4 the project and everything else it uses')
    pip_install('--editable', f'{ROOT}[det,seg,hub,parity,dev]')
    keep_headless_opencv()


def install_mmcv() -> None:
    """A prebuilt wheel if one fits, else pip's cached or a new source build;
    one that does not import (built for another torch) is built again."""
    if _succeeds(CHECK_MMCV):
        return
    for wheel in prebuilt_wheels():
        print(f'trying {wheel}')
        fits = (
            subprocess.run(
                [*pip_command(), '--no-deps', '--force-reinstall', wheel]
            ).returncode
            == 0
        )
        if fits and _succeeds(CHECK_MMCV):
            return
        print(f'{wheel.name} does not fit this Python and torch.')
    build_mmcv()
    if not _succeeds(CHECK_MMCV):
        print('the cached wheel of mmcv was built for another torch: building it again')
        # So that the next set-up does not take it again.
        subprocess.run(
            [PYTHON, '-m', 'pip', 'cache', 'remove', 'onedl_mmcv*'],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        build_mmcv('--force-reinstall', '--no-deps', '--no-cache-dir')
        if not _succeeds(CHECK_MMCV, show=True):
            raise SetupError(
                f'{pinned(MMCV)} was built but its operators fail: delete '
                '.venv and try again; if it persists, report the error above.'
            )


def build_mmcv(*options: str) -> None:
    """Builds mmcv from source with a progress line."""
    env = {**os.environ}
    env.setdefault('MAX_JOBS', str(os.cpu_count()))
    log = VENV / 'mmcv-build.log'
    print(f'building from source takes minutes; the whole log is {log}')
    with (
        log.open('w') as file,
        subprocess.Popen(
            [*pip_command(), '--verbose', *options, pinned(MMCV)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
            env=env,
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            step = re.match(r'\s*\[(\d+)/(\d+)\]', line)
            if step:
                end = '\n' if step[1] == step[2] else ''
                print(f'\rcompiling mmcv {step[1]}/{step[2]}', end=end, flush=True)
    if process.returncode:
        tail = ''.join(log.open(errors='replace').readlines()[-30:])
        raise SetupError(f'{tail}\nbuilding mmcv failed; the log is {log}.')


def keep_headless_opencv() -> None:
    """mmseg needs opencv-python, others opencv-python-headless; both write
    cv2/, and a server has no libGL, so the headless files must be the last."""
    pip_install('--force-reinstall', '--no-deps', pinned('opencv-python-headless'))


def verify() -> None:
    check = f'{CHECK_ALL}; assert cv2.version.headless'
    if not _succeeds(check, show=True):
        raise SetupError(
            'the packages were installed but do not import: '
            'delete .venv and try again; if it persists, report '
            'the error above.'
        )


def prebuilt_wheels() -> list:
    folders = [ROOT / 'wheels']
    if os.environ.get('CONVNEXT_MM_WHEELS'):
        folders.append(Path(os.environ['CONVNEXT_MM_WHEELS']))
    # Those for this Python and system; whether one fits torch shows on import.
    tag = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    return sorted(
        w for f in folders for w in f.glob(f'onedl_mmcv-*-{tag}-*{sys.platform}*.whl')
    )


def pinned(name: str) -> str:
    """``name==version`` from the constraints."""
    match = re.search(
        rf'^{re.escape(name)}==\S+', CONSTRAINTS.read_text(), re.MULTILINE
    )
    return match[0] if match else name


def pip_command() -> list:
    return [
        PYTHON,
        '-m',
        'pip',
        'install',
        '--no-build-isolation',
        '--disable-pip-version-check',
        '--constraint',
        CONSTRAINTS,
    ]


def pip_install(*arguments: str) -> None:
    run(
        [*pip_command(), *arguments],
        f"installing {' '.join(arguments)} failed: pip's message above says "
        'why; run the command again once it is mended.',
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
            [PYTHON, '-c', code],
            stdout=subprocess.DEVNULL,
            stderr=output,
            cwd=tempfile.gettempdir(),
        ).returncode
        == 0
    )


def say(message: str) -> None:
    print(f'\n=== {message}', flush=True)


if __name__ == '__main__':
    sys.exit(main())
