"""Findings on Python and on what is installed beside PyTorch."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .causes import HEADLESS, OPERATORS_COMMAND, why
from .evidence import (
    COMPILED,
    HEADS,
    OPENMMLAB,
    OPERATORS_SCRIPT,
    PACKAGE,
    Evidence,
    allows,
    own_requirements,
    release,
)
from .finding import Finding, Fix, not_examined

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OPENCV = (
    'opencv-python-headless',
    'opencv-python',
    'opencv-contrib-python-headless',
    'opencv-contrib-python',
)
# Import name to what it is for.
TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}


def python(evidence: Evidence) -> Iterator[Finding]:
    """Its version."""
    version = '.'.join(map(str, evidence.python))
    wanted = '3.10 to 3.13'
    if evidence.python[:2] < OLDEST_PYTHON:
        advice = 'make an environment with a newer one: `python3.12 -m venv .venv`'
        yield Finding('version', 'problem', f'{version}; {wanted} is needed', advice)
    elif evidence.python[:2] > NEWEST_PYTHON:
        yield Finding('version', 'note', f'{version}; proven are {wanted}')
    else:
        yield Finding('version', 'ok', version)


def environment(evidence: Evidence) -> Iterator[Finding]:
    """Whether it is the user's own."""
    prefix, base = evidence.prefixes
    if prefix != base or (Path(prefix) / 'conda-meta').is_dir():
        yield Finding('environment', 'ok', prefix)
    else:
        yield Finding(
            'environment',
            'note',
            f"{prefix} is the system's: what is installed here meets what others need",
            '`python -m venv .venv && source .venv/bin/activate`, then install there',
        )


def openmmlab(evidence: Evidence) -> Iterator[Finding]:
    """MMEngine and mmcv: one distribution of each."""
    for name in ('mmengine', 'mmcv'):
        there = evidence.installed(OPENMMLAB[name])
        if len(there) > 1:
            yield _clash(evidence, name)
        elif there:
            yield Finding(name, 'ok', evidence.named(there))
        elif name == 'mmengine':
            yield Finding(
                name, 'problem', 'is not installed', '`pip install onedl-mmengine`'
            )


def operators(evidence: Evidence) -> Iterator[Finding]:
    """mmcv's, and mmcv itself where there is none."""
    sentence, error = evidence.probes['operators']
    if error:
        message = error.removeprefix('stopped: ')
        yield Finding('mmcv operators', 'note', f'not examined: {message}')
        return
    message, command, rest = sentence.partition(f'; `{OPERATORS_COMMAND}`')
    if not command:
        yield Finding('mmcv operators', 'ok', sentence.rstrip('.'))
        return
    is_needed = any(evidence.installed(OPENMMLAB[name]) for name in HEADS)
    yield Finding(
        'mmcv operators',
        'problem' if is_needed else 'note',
        message,
        command.removeprefix('; ') + rest,
        operators_fix() if is_needed else None,
    )


def operators_fix() -> Fix:
    # By its path: as a module it would import MMEngine. Without dependencies: mmcv
    # asks for another OpenCV than a server has.
    command = [sys.executable, str(OPERATORS_SCRIPT), '--no-deps']

    def run() -> None:
        subprocess.run(command, check=True, stdout=sys.stderr)

    return Fix(shlex.join(command), run)


def tasks(evidence: Evidence) -> Iterator[Finding]:
    """Which can be trained here."""
    for name, task in TASKS.items():
        there = evidence.installed(OPENMMLAB[name])
        error = evidence.probes.get(name, evidence.probes['torch']).error
        if not there:
            install = f'`pip install {OPENMMLAB[name][0]}`'
            yield Finding(task, 'note', f'there is no {name}', install)
        elif len(there) > 1:
            yield _clash(evidence, name)
        elif error and (obstacle := evidence.obstacle()):
            yield not_examined(task, obstacle, evidence.named(there))
        elif error:
            yield Finding(
                task,
                'problem',
                f'{evidence.named(there)}: `import {name}.models` fails: {error}',
                why(error, there[0])
                or f'`pip install --force-reinstall --no-deps '
                f'{there[0]}`, or look at the whole error: `python -c "import '
                f'{name}.models"`',
            )
        else:
            yield Finding(task, 'ok', f'works with {evidence.named(there)}')


def _clash(evidence: Evidence, name: str) -> Finding:
    there = evidence.installed(OPENMMLAB[name])
    return Finding(
        name,
        'problem',
        f'{evidence.named(there)} are all the package {name} and overwrite each other',
        f'`pip uninstall --yes {" ".join(there)}`, then `pip install {there[0]}`',
    )


def transformers(evidence: Evidence) -> Iterator[Finding]:
    """Whether mmpretrain imports with it."""
    version = evidence.versions.get('transformers', '0')
    if release(version) >= (5,) and evidence.installed(OPENMMLAB['mmpretrain']):
        yield Finding(
            'transformers',
            'problem',
            f'{version}: mmpretrain, and what imports it (`mmdet.models`, '
            '`mmseg.models`), does not import with 5 or later',
            '`pip install "transformers<5"`',
        )


def package(evidence: Evidence) -> Iterator[Finding]:
    """convnext_mm, and what it needs in any case."""
    version = evidence.versions.get('convnext-mm')
    message = f'{version or "not installed, used"} from {PACKAGE.parent}'
    error = evidence.probes['convnext_mm'].error
    if not error:
        yield Finding('convnext_mm', 'ok' if version else 'note', message)
    elif obstacle := evidence.obstacle():
        yield not_examined('convnext_mm', obstacle, message)
    else:
        advice = (
            why(error, 'convnext-mm')
            or 'install it again: `pip install .` in a checkout'
        )
        message = f'{message}, does not import: {error}'
        yield Finding('convnext_mm', 'problem', message, advice)
    others = [(name, v) for name, v in own_requirements(evidence) if name != 'torch']
    good = []
    for name, wanted in others:
        version, error = evidence.versions.get(name), evidence.probes[name].error
        install = f'`pip install --upgrade "{name}{wanted}"`'
        if not version and error:
            yield Finding(name, 'problem', 'is not installed', install)
        elif version and not allows(wanted, version):
            yield Finding(name, 'problem', f'{version}; needed is {wanted}', install)
        elif error:
            message = f'{version or ""} does not import: {error}'.strip()
            advice = why(error, name) or install.replace(
                '--upgrade', '--force-reinstall'
            )
            yield Finding(name, 'problem', message, advice)
        else:
            good.append(f'{name} {version or ""}'.strip())
    if good:
        yield Finding('requirements', 'ok', ', '.join(good))


def opencv(evidence: Evidence) -> Iterator[Finding]:
    """One cv2, though several distributions bring it."""
    there = evidence.installed(OPENCV)
    version, error = evidence.probes['cv2']
    versions = {evidence.versions[name] for name in there}
    if error and not there:
        advice = '`pip install opencv-python-headless`'
        yield Finding('OpenCV', 'problem', f'is not installed ({error})', advice)
    elif len(versions) > 1:
        wanted = evidence.versions[there[0]]
        others = ' '.join(f'"{name}=={wanted}"' for name in there[1:])
        yield Finding(
            'OpenCV',
            'problem',
            f'{evidence.named(there)} overwrite each other: what is in cv2 is of both',
            f'`pip install --no-deps {others}`, then `pip install --force-reinstall '
            f'--no-deps "{there[0]}=={wanted}"`',
        )
    elif error:
        message = f'{evidence.named(there)}: cv2 does not import: {error}'
        advice = why(error, there[0]) or HEADLESS
        yield Finding('OpenCV', 'problem', message, advice)
    else:
        yield Finding('OpenCV', 'ok', evidence.named(there) or version)


def compiled(evidence: Evidence) -> Iterator[Finding]:
    """Compiled parts of libraries that OpenMMLab uses."""
    for name, module in COMPILED.items():
        if name in evidence.versions and (error := evidence.probes[name].error):
            yield Finding(
                name,
                'problem',
                f'{evidence.versions[name]}: `import {module}` fails: {error}',
                why(error, name) or f'`pip install --force-reinstall --no-deps {name}`',
            )


def optional(evidence: Evidence) -> Iterator[Finding]:
    """What some options need."""
    uses = {
        'huggingface-hub': 'checkpoints from hf:// and timm:// addresses',
        'tensorboard': 'curves in TensorBoard (`train --logger tensorboard`)',
    }
    for name, use in uses.items():
        if name in evidence.versions:
            yield Finding(name, 'ok', f'{evidence.versions[name]}: {use}')
        else:
            message = f'is not installed; needed for {use}'
            yield Finding(name, 'note', message, f'`pip install {name}`')
