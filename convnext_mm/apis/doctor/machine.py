"""Findings on the machine, the cache and the data."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .evidence import Evidence
from .finding import Finding, Fix

GIB = 2**30
DAY = 24 * 60 * 60
DISK_NEEDED, CACHE_NEEDED = 8 * GIB, 2 * GIB
SHARED_MEMORY_NEEDED = GIB
MEMORY_NEEDED = 4 * GIB
SHARED_MEMORY = Path('/dev/shm')
# Limits of a container, of either version of control groups.
MEMORY_LIMITS = (
    Path('/sys/fs/cgroup/memory.max'),
    Path('/sys/fs/cgroup/memory/memory.limit_in_bytes'),
)
# What lies in a data set, and where it comes from.
DATA = {
    'COCO': (
        'data/coco',
        (
            'train2017',
            'val2017',
            'annotations/instances_train2017.json',
            'annotations/instances_val2017.json',
        ),
        'COCO 2017 is at https://cocodataset.org/#download: unpack train2017, val2017 '
        'and annotations into data/coco, or name its place with --data-root DIR',
    ),
    'ADE20K': (
        'data/ade/ADEChallengeData2016',
        (
            'images/training',
            'images/validation',
            'annotations/training',
            'annotations/validation',
        ),
        'ADE20K (SceneParsing, 2016) is at http://sceneparsing.csail.mit.edu: unpack '
        'it into data/ade, or name its place with --data-root DIR',
    ),
    'shapes': (
        'data/shapes',
        (
            'images/training',
            'images/validation',
            'annotations/training',
            'annotations/validation',
            'annotations/instances_training.json',
            'annotations/instances_validation.json',
        ),
        'draw it: `python -m convnext_mm.datasets data/shapes`',
    ),
}


def processor(evidence: Evidence) -> Iterator[Finding]:
    """Cores, and threads that compute."""
    cores = len(os.sched_getaffinity(0))
    threads = evidence.environ.get('OMP_NUM_THREADS')
    message = f'{cores} cores'
    if threads is None:
        yield Finding('processor', 'ok', message)
    elif not threads.isdigit() or not 0 < int(threads) <= cores:
        message += f', and OMP_NUM_THREADS={threads}'
        advice = f'unset it, or set it to {cores} or less'
        yield Finding('processor', 'note', message, advice)
    else:
        yield Finding('processor', 'ok', f'{message}, OMP_NUM_THREADS={threads}')


def memory(evidence: Evidence) -> Iterator[Finding]:
    """Of the machine, or what its container has of it."""
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    for path in MEMORY_LIMITS:
        text = path.read_text().strip() if path.is_file() else ''
        if text.isdigit():
            total = min(total, int(text))
    message = f'{total / GIB:.1f} GiB'
    if total < MEMORY_NEEDED:
        advice = 'smaller batches and crops, train_dataloader.num_workers=0'
        yield Finding('memory', 'note', message, advice)
    else:
        yield Finding('memory', 'ok', message)


def shared_memory(evidence: Evidence) -> Iterator[Finding]:
    """What data workers hand batches over with."""
    if not SHARED_MEMORY.is_dir():
        return
    total = shutil.disk_usage(SHARED_MEMORY).total
    message = f'{SHARED_MEMORY} has {total / GIB:.2f} GiB'
    if total < SHARED_MEMORY_NEEDED:
        yield Finding(
            'shared memory',
            'problem',
            f'{message}: data workers may die (bus error)',
            '`docker run --shm-size=8g` or `--ipc=host`; without that, '
            '--cfg-options train_dataloader.num_workers=0 '
            'train_dataloader.persistent_workers=False',
        )
    else:
        yield Finding('shared memory', 'ok', message)


def disk(evidence: Evidence) -> Iterator[Finding]:
    """Where runs write, and downloads."""
    places = {'disk': (evidence.folder, DISK_NEEDED)}
    if folder := cache_folder(evidence):
        places['disk of cache'] = folder, CACHE_NEEDED
    for name, (path, needed) in places.items():
        free = shutil.disk_usage(_existing(path)).free
        message = f'{free / GIB:.1f} GiB free at {path}'
        if free < needed:
            message += f'; {needed // GIB} GiB are soon used'
            where = '--work-dir DIR' if name == 'disk' else 'CONVNEXT_MM_CACHE=DIR'
            advice = f'make room, or write elsewhere: {where}'
            yield Finding(name, 'note', message, advice)
        else:
            yield Finding(name, 'ok', message)


def cache(evidence: Evidence) -> Iterator[Finding]:
    """Downloaded checkpoints, and what was left of broken downloads."""
    folder = cache_folder(evidence)
    if folder is None:
        message = 'its ~ names no home folder'
        yield Finding('cache', 'problem', message, 'set CONVNEXT_MM_CACHE to a path')
        return
    if not os.access(_existing(folder), os.W_OK | os.X_OK):
        message = f'{folder} cannot be written'
        advice = 'set CONVNEXT_MM_CACHE to a folder of yours'
        yield Finding('cache', 'problem', message, advice)
        return
    # Each address has a folder; what else lies there may be of others.
    files = [
        (path, path.stat())
        for path in folder.glob('*/*')
        if re.fullmatch(r'[0-9a-f]{16}', path.parent.name) and path.is_file()
    ]
    size = sum(stat.st_size for _, stat in files)
    partial = [(p, stat) for p, stat in files if p.suffix == '.incomplete']
    locks = sum(path.suffix == '.lock' for path, _ in files)
    weights = len(files) - len(partial) - locks
    message = f'{folder}: {weights} checkpoints, {size / GIB:.2f} GiB'
    if partial:
        message += f', {len(partial)} incomplete downloads'
    if locks:
        message += f', {locks} lock files'
    old = [path for path, stat in partial if stat.st_mtime < time.time() - DAY]
    if not old:
        yield Finding('cache', 'ok', message)
        return

    def delete() -> None:
        for path in old:
            path.unlink(missing_ok=True)

    yield Finding(
        'cache',
        'note',
        f'{message}, {len(old)} of them older than a day',
        'download them again to go on, or delete them: `convnext-mm doctor --fix`',
        Fix(f'delete {len(old)} *.incomplete older than a day in {folder}', delete),
    )


def cache_folder(evidence: Evidence) -> Path | None:
    """As :func:`convnext_mm.checkpoint.remote.cache_dir`, which imports PyTorch."""
    base = evidence.environ.get('XDG_CACHE_HOME') or '~/.cache'
    own = evidence.environ.get('CONVNEXT_MM_CACHE') or f'{base}/convnext_mm'
    try:
        return Path(own).expanduser()
    except RuntimeError:
        return None


def data(evidence: Evidence) -> Iterator[Finding]:
    """Data sets where configs look for them."""
    for name, (place, parts, advice) in DATA.items():
        folder = evidence.folder / place
        missing = [part for part in parts if _is_empty(folder / part)]
        if not folder.exists() and not folder.is_symlink():
            yield Finding(name, 'note', f'{place} is not here', advice)
        elif missing:
            message = f'{place} is incomplete, missing or empty: {", ".join(missing)}'
            yield Finding(name, 'problem', message, advice)
        else:
            yield Finding(name, 'ok', f'{place} is complete')


def _is_empty(path: Path) -> bool:
    if path.is_dir():
        with os.scandir(path) as entries:
            return next(entries, None) is None
    return not path.is_file() or not path.stat().st_size


def _existing(path: Path) -> Path:
    """The deepest folder of a path that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
