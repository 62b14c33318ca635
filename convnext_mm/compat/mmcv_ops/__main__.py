"""Puts the operators on torchvision into this environment's mmcv, or takes them away.

    python -m convnext_mm.compat.mmcv_ops            # once; for every program after it
    python -m convnext_mm.compat.mmcv_ops --status
    python -m convnext_mm.compat.mmcv_ops --remove

An mmcv whose compiled operators import is left as it is. Where there is no mmcv,
its Python files are installed from the source archive, without compiling.
"""

# Standard library only: set-up runs this file by its path, before anything else is
# installed.
import argparse
import base64
import csv
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import invalidate_caches, metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name('operators.py')
MARK = SOURCE.read_text().partition('\n')[0]
# Beside the operators where mmcv itself was installed with them.
INSTALLED_MMCV = 'mmcv-was-installed-by-convnext_mm'
COMMAND = 'python -m convnext_mm.compat.mmcv_ops'
TROUBLESHOOTING = 'docs/troubleshooting.md'  # as convnext_mm.engine.errors has it
MAINTAINED, ORIGINAL = 'onedl-mmcv==2.3.6', 'mmcv==2.1.0'
# mmcv 2.1 needs pkg_resources to build, which later setuptools do not have.
BUILD_WITH = 'setuptools<81\n'
LOAD_COMPILED = """
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location('mmcv._ext', sys.argv[1])
spec.loader.exec_module(module_from_spec(spec))
"""
NEEDED = ('torch', 'torchvision', 'mmengine', 'cv2')
TRY_OPERATORS = """
import torch, mmcv.ops
boxes = torch.tensor([[0., 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
assert mmcv.ops.nms(boxes, torch.tensor([3., 2, 1]), 0.5)[1].tolist() == [0, 2]
"""


class OperatorsError(Exception):
    """What the user has to do first; the message is the advice.

    See ``docs/troubleshooting.md#mmcv-operators``."""

    anchor = 'mmcv-operators'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--status', action='store_true', help='say what is there')
    what.add_argument('--remove', action='store_true', help='undo')
    parser.add_argument(
        '--no-deps', action='store_true', help='do not install what mmcv needs'
    )
    parser.add_argument(
        '--no-try', action='store_true', help='do not import the operators'
    )
    args = parser.parse_args(arguments)
    try:
        if args.status:
            print(status())
        elif args.remove:
            print(remove())
        else:
            print(install(*['--no-deps'] * args.no_deps, trial=not args.no_try))
    except OperatorsError as error:
        print(
            f'stopped: {error}\nMore: {TROUBLESHOOTING}#{error.anchor}', file=sys.stderr
        )
        return 1
    except OSError as error:
        print(
            f'stopped: {error}. Free disk, or run this as the owner of the '
            'environment (or in one of your own, `python -m venv`), and run it again.',
            file=sys.stderr,
        )
        return 1
    return 0


def status() -> str:
    """One sentence on this environment's mmcv."""
    folder = mmcv_folder()
    if folder is None:
        return f'there is no mmcv in this environment; `{COMMAND}` installs it.'
    place = folder / '_ext' / '__init__.py'
    if is_ours(place):
        stale = place.read_bytes() != SOURCE.read_bytes()
        return f'operators on torchvision are in {folder}' + (
            f', of another version of convnext_mm; `{COMMAND}` brings them up to date.'
            if stale
            else '.'
        )
    if compiled(folder):
        fault = compiled_fault(folder)
        if fault is None:
            return f'the compiled operators of {folder} import.'
        return (
            f'the compiled operators of {folder} do not import ({fault}); '
            f'`{COMMAND}` puts those on torchvision in their place.'
        )
    return f'{folder} has no operators; `{COMMAND}` brings them.'


def install(*options: str, trial: bool = True) -> str:
    """Installs the operators, and mmcv where there is none.

    Args:
        *options: For pip, where it installs mmcv.
        trial: Import the operators in the end.

    Returns:
        One sentence on what was done.

    Raises:
        OperatorsError: pip failed, or what is there cannot be judged.
        OSError: The environment cannot be written.
    """
    folder, came_along = mmcv_folder(), False
    if folder is None:
        install_mmcv(*options)
        folder, came_along = mmcv_folder(), True
        if folder is None:
            raise OperatorsError(
                'pip installed mmcv elsewhere than where this Python looks: '
                'see `python -m pip show -f onedl-mmcv`.'
            )
    place = folder / '_ext' / '__init__.py'
    if not is_ours(place) and compiled(folder) and compiled_fault(folder) is None:
        return f'the compiled operators of {folder} import: they are left as they are.'
    if place.exists() and not is_ours(place):
        raise OperatorsError(
            f'{place} is not of convnext_mm: move it away to have these operators.'
        )
    write(place, SOURCE.read_bytes())
    if came_along:
        write(place.with_name(INSTALLED_MMCV), b'')
    list_as_installed(folder, [place, place.with_name(INSTALLED_MMCV)])
    done = f'operators on torchvision are in {folder}'
    if not trial:
        return f'{done}.'
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return f'{done}; to import them mmcv needs {", ".join(missing)} as well.'
    fault = fault_of(TRY_OPERATORS)
    if fault:
        raise OperatorsError(f'those put into {folder} do not work: {fault}')
    return f'{done}.'


def remove() -> str:
    """Takes the operators away, and an mmcv that came with them."""
    folder = mmcv_folder()
    place = folder and folder / '_ext' / '__init__.py'
    if not folder or not place or not is_ours(place):
        return 'there are no operators of convnext_mm in this environment.'
    mark = place.with_name(INSTALLED_MMCV)
    if mark.exists():
        run_pip('uninstall', '--yes', distribution_of(folder) or 'onedl-mmcv')
        if place.exists():
            raise OperatorsError(
                f'pip does not uninstall {folder}, which is of another environment: '
                "run this with that one's Python."
            )
        shutil.rmtree(place.parent, ignore_errors=True)
        return 'mmcv, which had been installed with the operators, is gone with them.'
    shutil.rmtree(place.parent)
    list_as_installed(folder, [])
    return f'the operators are gone from {folder}, which is as it was before.'


def install_mmcv(*options: str) -> None:
    """mmcv's Python files. In the isolation in which pip builds by default there is
    no PyTorch, and without it mmcv's set-up leaves the operators out."""
    names = {name.lower() for d in metadata.distributions() if (name := d.name)}
    original = names & {'mmengine', 'mmdet', 'mmsegmentation'} and not any(
        name.startswith('onedl-') for name in names
    )
    wanted = ORIGINAL if original else MAINTAINED
    print(f'installing the Python files of {wanted}', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        limits = Path(folder) / 'build.txt'
        limits.write_text(BUILD_WITH)
        # Older pips build under the one, newer ones under the other.
        env = {
            **os.environ,
            'PIP_CONSTRAINT': str(limits),
            'PIP_BUILD_CONSTRAINT': str(limits),
        }
        env.pop('PIP_NO_BUILD_ISOLATION', None)
        # The cache may hold a wheel with operators compiled for another PyTorch.
        name = wanted.partition('==')[0]
        only = ('--no-deps', '--no-cache-dir', '--use-pep517', '--no-binary', name)
        run_pip('wheel', *only, '--wheel-dir', folder, wanted, env=env)
        (wheel,) = Path(folder).glob('*.whl')
        if not wheel.name.endswith('-none-any.whl'):
            raise OperatorsError(
                f'pip compiled {wheel.name}, which takes a pip that builds in '
                'isolation: remove no-build-isolation from `pip config list`.'
            )
        run_pip('install', *options, str(wheel))


def run_pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    result = subprocess.run(
        [sys.executable, '-m', 'pip', '--disable-pip-version-check', *arguments],
        capture_output=True,
        text=True,
        env=env,
    )
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        errors = [line for line in said if 'error' in line.lower()] or said
        raise OperatorsError(
            f'`pip {arguments[0]}` failed: '
            f'{errors[0].strip() if errors else "without a word"}. Mend that (the '
            'network, pip, free disk) and run this again.'
        )


def mmcv_folder() -> Path | None:
    """Where this Python finds mmcv, without importing it."""
    invalidate_caches()
    spec = find_spec('mmcv')
    # What an incomplete uninstallation leaves is a package without __init__.
    return Path(spec.origin).parent if spec and spec.origin else None


def compiled(folder: Path) -> list[Path]:
    paths = (folder / f'_ext{suffix}' for suffix in EXTENSION_SUFFIXES)
    return [path for path in paths if path.exists()]


def compiled_fault(folder: Path) -> str | None:
    """Why the compiled operators do not import, None if they do."""
    fault = fault_of('import torch')
    if fault:
        raise OperatorsError(
            f'PyTorch does not import ({fault}), so the compiled operators of {folder} '
            'cannot be tried: install PyTorch first.'
        )
    return fault_of(LOAD_COMPILED, str(compiled(folder)[0]))


def fault_of(code: str, *arguments: str) -> str | None:
    """The last line of what a Python program of its own says when it fails: an
    extension for another PyTorch may end the process."""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code, *arguments],
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    if not result.returncode:
        return None
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f'Python ended with status {result.returncode}'


def is_ours(place: Path) -> bool:
    return place.is_file() and place.read_text().startswith(MARK)


def write(path: Path, content: bytes) -> None:
    """All of a file or nothing."""
    new = not path.parent.exists()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f'{path.name}.part')
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        if new:
            path.parent.rmdir()
        raise


def distribution_of(folder: Path) -> str | None:
    """The name of the distribution that has installed a package, and not only
    points at it as an editable one does."""
    for distribution in metadata.distributions():
        init = distribution.locate_file('mmcv/__init__.py')
        listed = distribution.read_text('RECORD') or ''
        if Path(str(init)) == folder / '__init__.py' and 'mmcv/__init__.py,' in listed:
            return distribution.name
    return None


def list_as_installed(folder: Path, files: list[Path]) -> None:
    """Lists our files with mmcv's, so that pip uninstalls them with it."""
    name = distribution_of(folder)
    if name is None:
        return
    distribution = metadata.distribution(name)
    path = next(
        Path(str(distribution.locate_file(file)))
        for file in distribution.files or ()
        if file.name == 'RECORD'
    )
    rows = csv.reader(path.read_text().splitlines())
    kept = [row for row in rows if not row[0].startswith('mmcv/_ext/')]
    for file in files:
        if file.exists():
            content = file.read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            row = f'sha256={digest.decode().rstrip("=")}', str(len(content))
            kept.append([f'mmcv/_ext/{file.name}', *row])
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(kept)
    write(path, text.getvalue().encode())


if __name__ == '__main__':
    sys.exit(main())
