"""Injects faults into short distributed runs, and writes what became of them to
benchmarks/faults.json and docs/reliability.md.

Each run is the UPerNet demo on drawn shapes, 24 steps, through the same doors as a
user's. A fault that loses more than the steps since the last checkpoint, ends without
a sentence, or leaves other weights than the undisturbed run's is a failure.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from convnext_mm.analysis.machine import machine
from convnext_mm.checkpoint import read_checkpoint
from convnext_mm.checkpoint.write import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'configs/demo/upernet_convnext-atto_shapes.py'
LAYER_DECAY = 'convnext_mm.LayerDecayOptimWrapperConstructor'
STEPS = 24
SHOWN = 240  # letters of what the user saw, in the page
MARK = '<!-- made by tools/maintenance/inject_faults.py -->'
QUICK = {
    'train_cfg.max_iters': STEPS,
    'train_cfg.val_interval': 12,
    'default_hooks.checkpoint.interval': 8,
    'default_hooks.checkpoint.max_keep_ckpts': 1,
    'default_hooks.logger.interval': 1,
    'train_dataloader.batch_size': 2,
    'randomness.seed': 1,
}
NO_WORKERS = {
    f'{name}_dataloader.{key}': value
    for name in ('train', 'val', 'test')
    for key, value in (('num_workers', 0), ('persistent_workers', False))
}


@dataclass
class Outcome:
    """What became of a fault."""

    name: str
    fault: str
    saw: str = ''  # the last line that the user saw
    status: int | None = None
    steps_lost: int | None = None
    difference: float | None = None  # of the weights to the undisturbed run's
    seconds: float = 0
    problems: list[str] = field(default_factory=list)


class Place:
    """Data and undisturbed runs, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / 'data'
        if not (self.data / 'annotations/instances_validation.json').exists():
            subprocess.run(
                [
                    *(sys.executable, '-m', 'convnext_mm.datasets', self.data),
                    *'--train 15 --val 4 --size 64'.split(),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
            )

    def reference(self, processes: int, options: dict[str, Any]) -> Path:
        """The last checkpoint of a run that nothing disturbs."""
        key = json.dumps([processes, sorted(options.items())], default=str)
        folder = self.folder / f'undisturbed-{zlib.crc32(key.encode())}'
        last = folder / f'iter_{STEPS}.pth'
        if not last.exists():
            run = Run(self, folder, processes, options).start('--overwrite')
            assert run.wait() == 0, run.output()[-3000:]
        return last


class Run:
    """A training run in a work folder, which may be started several times."""

    def __init__(
        self,
        place: Place,
        folder: Path,
        processes: int = 1,
        options: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.place, self.folder, self.processes = place, folder, processes
        self.given = options or {}
        self.options = {**QUICK, **NO_WORKERS, **self.given}
        self.env = env or {}
        self.config = CONFIG
        self.log = folder.with_suffix('.log')
        self.process: subprocess.Popen | None = None

    def command(self, *arguments: str) -> list[str]:
        settings = [f'{key}={value}' for key, value in self.options.items()]
        start = (
            [sys.executable, 'tools/train.py', self.config]
            if self.processes == 1
            else ['bash', 'tools/dist_train.sh', self.config, str(self.processes)]
        )
        return [
            *start,
            '--work-dir',
            str(self.folder),
            '--data-root',
            str(self.place.data),
            *arguments,
            '--cfg-options',
            *settings,
        ]

    def start(self, *arguments: str) -> 'Run':
        env = {
            **os.environ,
            'PYTHON': sys.executable,
            'PYTHONPATH': str(ROOT),
            'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore',
            **self.env,
        }
        with open(self.log, 'a') as log:
            self.process = subprocess.Popen(
                self.command(*arguments),
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def steps(self) -> list[int]:
        """Logged training steps of all starts, in order."""
        lines = [
            json.loads(line)
            for file in sorted(self.folder.glob('*/vis_data/scalars.json'))
            for line in file.read_text().splitlines()
        ]
        return [line['step'] for line in lines if 'loss' in line]

    def wait_for(self, step: int, limit: float = 300) -> None:
        """Until that step is logged."""
        self.wait_until(lambda: step in self.steps()[-step - 2 :], limit)

    def wait_until(self, condition: Callable[[], bool], limit: float = 300) -> None:
        end = time.monotonic() + limit
        while not condition():
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(f'it ended before: {self.output()[-2000:]}')
            if time.monotonic() > end:
                raise AssertionError(f'not within {limit} s: {self.output()[-2000:]}')
            time.sleep(0.02)

    def wait(self, limit: float = 420) -> int:
        assert self.process is not None
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f'it hangs: {self.output()[-2000:]}') from None

    def workers(self) -> list[int]:
        """Process ids that run tools/train.py, without those that load data."""
        return [
            pid
            for pid in tree(self.process.pid)
            if b'train.py' in command_line(pid)
            and b'launcher' not in command_line(pid)
            and not is_child_of(pid, b'train.py')
        ]

    def kill_all(self) -> None:
        for pid in [*tree(self.process.pid), self.process.pid]:
            signal_to(pid, signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def last_line(self) -> str:
        return last_said(self.output())


def last_said(output: str) -> str:
    """The last line, but for the one that says where more is."""
    lines = [line.strip() for line in output.splitlines()]
    said = [line for line in lines if line and not line.startswith('More: docs/')]
    return said[-1] if said else ''


def tree(pid: int) -> list[int]:
    """Descendants of a process."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = path.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        found.append((int(path.parent.name), int(fields[1])))
    below, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, above in found if above == parent]
        below += children
        todo += children
    return below


def command_line(pid: int) -> bytes:
    try:
        return Path(f'/proc/{pid}/cmdline').read_bytes()
    except OSError:
        return b''


def is_child_of(pid: int, name: bytes) -> bool:
    try:
        parent = int(
            Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1]
        )
    except OSError:
        return True
    line = command_line(parent)
    return name in line and b'launcher' not in line


def signal_to(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_runs_in(folder: Path) -> None:
    """Nothing of a fault may disturb the next one."""
    for path in Path('/proc').glob('[0-9]*'):
        if str(folder).encode() in command_line(int(path.name)).split(b'\0'):
            signal_to(int(path.name), signal.SIGKILL)


def difference(ours: Path, theirs: Path) -> float:
    """The largest, of all weights."""
    a, b = (read_checkpoint(path)['state_dict'] for path in (ours, theirs))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


FAULTS: dict[str, tuple[str, Callable[[Place, Path, Outcome], None]]] = {}


def fault(name: str, what: str) -> Callable:
    """Registers a function as a fault to inject."""

    def register(function: Callable) -> Callable:
        FAULTS[name] = what, function
        return function

    return register


def check(outcome: Outcome, condition: bool, problem: str) -> None:
    if not condition:
        outcome.problems.append(problem)


def finish(
    run: Run,
    outcome: Outcome,
    *arguments: str,
    resume: bool = True,
    same_as: dict[str, Any] | None = None,
) -> None:
    """Resumes a run to its end and compares it with the undisturbed one."""
    if resume:
        run.start(*(arguments or ('--resume',)))
        status = run.wait()
        check(outcome, status == 0, f'resuming ended with {status}: {run.last_line()}')
    steps = run.steps()
    outcome.steps_lost = len(steps) - STEPS
    last = run.folder / f'iter_{STEPS}.pth'
    check(outcome, last.exists(), f'no {last.name}')
    if last.exists():
        reference = run.place.reference(run.processes, {**run.given, **(same_as or {})})
        outcome.difference = difference(last, reference)
        check(outcome, outcome.difference == 0, 'other weights')


WORKERS = {
    'train_dataloader.num_workers': 2,
    'train_dataloader.persistent_workers': True,
}
# Every way of training whose resumption must be exact.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    'one process': (1, {}),
    'two data workers': (1, WORKERS),
    'accumulation of 3': (1, {'optim_wrapper.accumulative_counts': 3}),
    'averaged weights': (1, {'default_hooks.average.type': 'EMAHook'}),
    'bfloat16': (
        1,
        {
            'optim_wrapper.type': 'convnext_mm.AmpOptimWrapper',
            'optim_wrapper.dtype': 'bfloat16',
        },
    ),
    'two processes': (2, {}),
}
SIGNALS = ('SIGTERM', 'SIGINT', 'SIGUSR1')


def stopped_and_resumed(run: Run, outcome: Outcome, words: str) -> None:
    """It must end as one that a scheduler puts back, and lose no step."""
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 75, 'not the status to requeue')
    check(outcome, words in outcome.saw, f'{words!r} is not said')
    finish(run, outcome)
    check(outcome, outcome.steps_lost == 0, 'steps were lost')


def interrupt(way: str, name: str, step: int) -> Callable[[Place, Path, Outcome], None]:
    processes, options = WAYS[way]

    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(place, folder, processes, options).start()
        run.wait_for(step)
        os.kill(run.process.pid, getattr(signal, name))
        stopped_and_resumed(run, outcome, 'go on with --resume')

    return inject


for way in WAYS:
    for name in SIGNALS if way in ('one process', 'two processes') else SIGNALS[:1]:
        fault(f'{name.lower()}-{way.replace(" ", "-")}', f'{name} in step 13, {way}')(
            interrupt(way, name, 13)
        )


@fault('sigterm-group', 'SIGTERM to all processes of a job, data workers too')
def sigterm_group(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 1, WORKERS).start()
    run.wait_for(13)
    os.killpg(run.process.pid, signal.SIGTERM)
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 75, 'not the status to requeue')
    finish(run, outcome)
    check(outcome, outcome.steps_lost == 0, 'steps were lost')


def kill_and_resume(way: str, step: int) -> Callable[[Place, Path, Outcome], None]:
    processes, options = WAYS[way]

    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(place, folder, processes, options).start()
        run.wait_for(step)
        run.kill_all()
        outcome.status = run.wait()
        outcome.saw = 'nothing: it was killed'
        finish(run, outcome)
        check(outcome, (outcome.steps_lost or 0) <= 8 + 2, 'too many steps were lost')

    return inject


for way in WAYS:
    fault(f'kill-{way.replace(" ", "-")}', f'SIGKILL of everything in step 13, {way}')(
        kill_and_resume(way, 13)
    )


def kill_at_random(seed: int) -> Callable[[Place, Path, Outcome], None]:
    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        draw = random.Random(seed)
        run = Run(place, folder, 1, {'default_hooks.checkpoint.interval': 2})
        run.start()
        for _ in range(3):
            done = max(run.steps(), default=0)
            step = draw.randint(done + 1, max(done + 1, min(done + 7, STEPS - 1)))
            run.wait_until(lambda step=step: max(run.steps(), default=0) >= step)
            time.sleep(draw.random() * 0.3)  # also in the middle of a save
            run.kill_all()
            run.wait()
            run.start('--resume')
        outcome.status = run.wait()
        outcome.saw = 'nothing: it was killed'
        finish(run, outcome, resume=False)

    return inject


for seed in range(6):
    fault(f'kill-at-random-{seed}', 'SIGKILL at 3 random moments, a save every 2')(
        kill_at_random(seed)
    )


@fault('kill-during-save', 'SIGKILL while a checkpoint is written, one is kept')
def kill_during_save(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder).start()
    run.wait_for(9)
    run.wait_until(lambda: any(folder.glob('.iter_16*')))
    run.kill_all()
    outcome.status = run.wait()
    outcome.saw = 'nothing: it was killed'
    check(outcome, (folder / 'iter_8.pth').exists(), 'the checkpoint before is gone')
    finish(run, outcome)
    check(outcome, not list(folder.glob('.*.part')), 'a part is left')


def spoil(name: str, what: str, action: Callable[[Path], object], skips: bool) -> None:
    """A fault of files between two starts."""

    @fault(name, what)
    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(place, folder, 1, {'default_hooks.checkpoint.max_keep_ckpts': 2})
        run.start()
        run.wait_for(18)
        run.wait_until((folder / 'iter_16.pth').exists)
        run.kill_all()
        run.wait()
        action(folder)
        finish(run, outcome)
        outcome.saw = next(
            (x for x in run.output().splitlines() if 'Skipped a' in x), 'nothing'
        )
        outcome.status = run.process.returncode
        check(outcome, ('Skipped' in outcome.saw) is skips, 'not said')


def flip(path: Path, count: int = 20) -> None:
    content = bytearray(path.read_bytes())
    draw = random.Random(0)
    for _ in range(count):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


for name, what, action, skips in (
    ('torn', 'last checkpoint torn', lambda f: truncate(f / 'iter_16.pth', 0.6), True),
    ('empty', 'last checkpoint empty', lambda f: truncate(f / 'iter_16.pth', 0), True),
    (
        'flipped',
        'bits of the last checkpoint flipped',
        lambda f: flip(f / 'iter_16.pth'),
        True,
    ),
    (
        'no-pointer',
        'last_checkpoint missing',
        lambda f: (f / 'last_checkpoint').unlink(),
        False,
    ),
    (
        'empty-pointer',
        'last_checkpoint empty',
        lambda f: truncate(f / 'last_checkpoint', 0),
        False,
    ),
    (
        'wrong-pointer',
        'last_checkpoint names what is gone',
        lambda f: (f / 'last_checkpoint').write_text('/nowhere/iter_99.pth'),
        False,
    ),
    (
        'part-left',
        'a part of a checkpoint left over',
        lambda f: (f / '.iter_24.pth.1.part').write_bytes(b'x'),
        False,
    ),
):
    spoil(name, what, action, skips)


def refused(
    outcome: Outcome, run: Run, *words: str, arguments: tuple[str, ...] = ('--resume',)
) -> None:
    """Starts a run that must end in a sentence with these words."""
    run.start(*arguments)
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status != 0, 'status 0')
    for word in words:
        check(outcome, word in outcome.saw, f'{word!r} is not said')


@contextmanager
def half_a_run(
    place: Place, folder: Path, processes: int = 1, options: dict | None = None
) -> Iterator[Run]:
    """A run that ended at step 13 with its state saved."""
    run = Run(place, folder, processes, options).start()
    run.wait_for(13)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait() == 75, run.output()[-2000:]
    yield run


@fault('all-spoiled', 'every checkpoint torn')
def all_spoiled(place: Place, folder: Path, outcome: Outcome) -> None:
    with half_a_run(place, folder) as run:
        for path in folder.glob('*.pth'):
            truncate(path, 0.5)
        refused(outcome, run, 'none can be read', '--overwrite')


@fault('moved', 'work folder moved')
def moved(place: Place, folder: Path, outcome: Outcome) -> None:
    with half_a_run(place, folder) as run:
        target = folder.with_name('moved-there')
        shutil.move(folder, target)
        other = Run(place, target)
        finish(other, outcome)
        outcome.saw, outcome.status = 'nothing', other.process.returncode
        check(outcome, not folder.exists(), 'the old folder came back')
        del run


@fault('started-anew', 'a new run in a folder that holds checkpoints')
def started_anew(place: Place, folder: Path, outcome: Outcome) -> None:
    with half_a_run(place, folder) as run:
        refused(outcome, run, '--resume', '--overwrite', '--work-dir', arguments=())
        finish(run, outcome)


@fault('overwritten', '--overwrite in a folder that holds checkpoints')
def overwritten(place: Place, folder: Path, outcome: Outcome) -> None:
    with half_a_run(place, folder) as run:
        finish(run, outcome, '--overwrite')
        outcome.saw, outcome.status = run.last_line(), run.process.returncode
        outcome.steps_lost = None  # as was asked for


@fault('two-runs', 'a second run in the work folder of a living one')
def two_runs(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 1, {'train_cfg.max_iters': 10**4}).start()
    run.wait_for(3)
    other = Run(place, folder)
    other.log = folder.with_suffix('.other.log')
    refused(outcome, other, 'under way', str(run.process.pid))
    os.kill(run.process.pid, signal.SIGTERM)
    check(outcome, run.wait() == 75, 'the first run was disturbed')


@fault('older-resumed', '--resume of an older checkpoint beside newer ones')
def older_resumed(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 1, {'default_hooks.checkpoint.max_keep_ckpts': 3}).start()
    assert run.wait() == 0, run.output()[-2000:]
    older = str(folder / 'iter_16.pth')
    refused(outcome, run, 'iter_24.pth', '--overwrite', arguments=('--resume', older))
    finish(run, outcome, '--resume', older, '--overwrite')
    outcome.steps_lost = None  # as was asked for


for name, what, options, words in (
    ('lr', 'another learning rate', {'optim_wrapper.optimizer.lr': 0.5}, ('lr was',)),
    (
        'decay',
        'another layer decay',
        {
            'optim_wrapper.constructor': LAYER_DECAY,
            'optim_wrapper.paramwise_cfg.decay_rate': 0.5,
            'optim_wrapper.paramwise_cfg.decay_type': 'layer_wise',
        },
        ('paramwise_cfg.decay_rate',),
    ),
    (
        'schedule',
        'another schedule',
        {'param_scheduler.0.end': 3},
        ('param_scheduler',),
    ),
    (
        'classes',
        'another number of classes',
        {'model.decode_head.num_classes': 4, 'model.auxiliary_head.num_classes': 4},
        ('num_classes',),
    ),
    (
        'width',
        'a wider head',
        {'model.decode_head.channels': 96},
        ('decode_head', 'size mismatch'),
    ),
):

    @fault(f'changed-{name}', f'resumed with {what}')
    def changed(
        place: Place, folder: Path, outcome: Outcome, options=options, words=words
    ) -> None:
        with half_a_run(place, folder) as run:
            other = Run(place, folder, 1, options)
            refused(outcome, other, *words)
            finish(run, outcome)


for name, what, before, now in (
    (
        'batch',
        'batches of 1 instead of 2',
        (1, {}),
        (1, {'train_dataloader.batch_size': 1}),
    ),
    ('fewer', 'one process instead of two', (2, {}), (1, {})),
    ('more', 'two processes instead of one', (1, {}), (2, {})),
):

    @fault(f'changed-{name}', f'resumed with {what}')
    def rescaled(
        place: Place, folder: Path, outcome: Outcome, before=before, now=now
    ) -> None:
        with half_a_run(place, folder, *before):
            run = Run(place, folder, *now).start('--resume')
            outcome.status = run.wait()
            lines = [x for x in run.output().splitlines() if 'goes on behind' in x]
            outcome.saw = lines[-1] if lines else run.last_line()
            check(outcome, outcome.status == 0 and len(lines) == 1, 'not one line')


def kill_rank(which: int) -> Callable[[Place, Path, Outcome], None]:
    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(place, folder, 2).start()
        run.wait_for(13)
        pids = rank_pids(run)
        signal_to(pids[which], signal.SIGKILL)
        outcome.status = run.wait()
        lines = [x for x in run.output().splitlines() if 'restart 1 of 3' in x]
        outcome.saw = lines[-1] if lines else run.last_line()
        check(outcome, outcome.status == 0, 'not mended')
        check(outcome, bool(lines) and 'SIGKILL' in lines[0], 'not said')
        finish(run, outcome, resume=False)

    return inject


def rank_pids(run: Run) -> dict[int, int]:
    """Rank to process id."""
    found = {}
    for pid in tree(run.process.pid):
        try:
            env = Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')
        except OSError:
            continue
        rank = next((int(x[5:]) for x in env if x.startswith(b'RANK=')), None)
        if rank is not None and b'train.py' in command_line(pid):
            found.setdefault(rank, pid)
    return found


for which in (0, 1):
    fault(f'kill-rank-{which}', f'SIGKILL of process {which} of 2 in step 13')(
        kill_rank(which)
    )


@fault('kill-rank-no-restart', 'the same with MAX_RESTARTS=0')
def kill_rank_no_restart(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 2, env=dict(MAX_RESTARTS='0')).start()
    run.wait_for(13)
    signal_to(rank_pids(run)[1], signal.SIGKILL)
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 1, 'not status 1')
    check(outcome, 'process 1 was ended by SIGKILL' in outcome.saw, 'not said')
    finish(run, outcome)


@fault('kill-ranks', 'SIGKILL of both processes in step 13')
def kill_ranks(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 2).start()
    run.wait_for(13)
    for pid in rank_pids(run).values():
        signal_to(pid, signal.SIGKILL)
    outcome.status = run.wait()
    outcome.saw = next(
        (x for x in run.output().splitlines() if 'restart 1 of 3' in x), run.last_line()
    )
    finish(run, outcome, resume=False)


@fault('kill-launcher', 'SIGKILL of the launcher in step 13')
def kill_launcher(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 2).start()
    run.wait_for(13)
    orphans = rank_pids(run).values()
    os.kill(run.process.pid, signal.SIGKILL)
    outcome.status = run.wait()
    end = time.monotonic() + 90
    while any(command_line(pid) for pid in orphans) and time.monotonic() < end:
        time.sleep(0.1)
    check(outcome, not any(map(command_line, orphans)), 'orphans train on')
    outcome.saw = run.last_line()
    finish(run, outcome)


def stop_rank(which: int) -> Callable[[Place, Path, Outcome], None]:
    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(
            place,
            folder,
            2,
            {
                'default_hooks.stall.type': 'convnext_mm.StallHook',
                'default_hooks.stall.frozen_seconds': 15,
            },
        ).start()
        run.wait_for(13)
        signal_to(rank_pids(run)[which], signal.SIGSTOP)
        outcome.status = run.wait()
        lines = [x for x in run.output().splitlines() if 'restart 1 of 3' in x]
        outcome.saw = lines[-1] if lines else run.last_line()
        check(outcome, bool(lines) and f'process {which}' in lines[0], 'not named')
        check(outcome, any((folder / 'stacks').glob('*')), 'no stacks')
        finish(run, outcome, resume=False)

    return inject


for which in (0, 1):
    fault(f'stop-rank-{which}', f'SIGSTOP of process {which} of 2 in step 13')(
        stop_rank(which)
    )


@fault('kill-data-worker', 'SIGKILL of a process that loads data')
def kill_data_worker(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 1, WORKERS).start()
    run.wait_for(13)
    signal_to(tree(run.process.pid)[0], signal.SIGKILL)
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 1, 'not status 1')
    check(outcome, 'worker' in outcome.saw, 'not said')
    finish(run, outcome)


@fault('lr-1e10', 'a learning rate of 1e10')
def huge_lr(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(
        place,
        folder,
        1,
        {
            'optim_wrapper.optimizer.lr': 1e10,
            'default_hooks.non_finite.type': 'convnext_mm.NonFiniteHook',
            'default_hooks.non_finite.limit': 5,
        },
    )
    refused(outcome, run, 'learning rate', arguments=())


@fault('port', 'PORT in use')
def port_in_use(place: Place, folder: Path, outcome: Outcome) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = Run(place, folder, 2, env=dict(PORT=str(port))).start()
        outcome.status = run.wait()
    outcome.saw = run.output().splitlines()[0]
    check(outcome, f'Port {port} is in use' in outcome.saw, 'not said')
    finish(run, outcome, resume=False)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={megabytes}m', 'tmpfs', str(folder)],
        check=True,
    )
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def with_a_checkpoint(place: Place, folder: Path, options: dict | None = None) -> Run:
    """A run that has saved after step 8."""
    run = Run(place, folder, 1, options).start()
    run.wait_for(9)
    run.wait_until((folder / 'iter_8.pth').exists)
    return run


@fault('disk-full', 'a disk that is full at step 16, with room again at the end')
def disk_full(place: Place, folder: Path, outcome: Outcome) -> None:
    with small_disk(folder, 120):
        run = with_a_checkpoint(place, folder)
        filler = folder / 'filler'
        free = shutil.disk_usage(folder).free
        filler.write_bytes(b'0' * (free - 2**20))
        run.wait_until(lambda: 'could not be written' in run.output())
        outcome.saw = next(
            x for x in run.output().splitlines() if 'could not be written' in x
        )
        run.wait_for(STEPS)
        check(outcome, (folder / 'iter_8.pth').exists(), 'the checkpoint is gone')
        check(outcome, not list(folder.glob('.*.part')), 'a part is left')
        filler.unlink()
        outcome.status = run.wait()
        check(outcome, outcome.status == 0, 'status')
        finish(run, outcome, resume=False)


@fault('disk-without-a-byte', 'a disk without a byte from step 9 on, room at the end')
def disk_without_a_byte(place: Place, folder: Path, outcome: Outcome) -> None:
    with small_disk(folder, 120):
        run = with_a_checkpoint(place, folder)
        filler = folder / 'filler'
        with suppress(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(b'0' * 4096)
        run.wait_until(lambda: f'Iter(train) [{STEPS}/{STEPS}]' in run.output())
        run.wait_until(lambda: f'iter_{STEPS}.pth could not' in run.output())
        outcome.saw = next(
            x for x in run.output().splitlines() if 'could not be written' in x
        )
        filler.unlink()
        outcome.status = run.wait()
        check(outcome, outcome.status == 0, 'status')
        finish(run, outcome, resume=False)
        outcome.steps_lost = None  # their log had no room


@fault('disk-stays-full', 'a disk that stays full, give_up_minutes=0.05')
def disk_stays_full(place: Place, folder: Path, outcome: Outcome) -> None:
    with small_disk(folder, 120):
        options = {'default_hooks.checkpoint.give_up_minutes': 0.05}
        run = with_a_checkpoint(place, folder, options)
        filler = folder / 'filler'
        filler.write_bytes(b'0' * (shutil.disk_usage(folder).free - 2**20))
        outcome.status = run.wait()
        outcome.saw = run.last_line()
        check(outcome, outcome.status == 1, 'not status 1')
        check(outcome, 'iter_8.pth' in outcome.saw, 'the last one is not named')
        filler.unlink()
        finish(run, outcome)


@fault('read-only', 'a work folder that cannot be written')
def read_only(place: Place, folder: Path, outcome: Outcome) -> None:
    with small_disk(folder, 10):
        subprocess.run(['mount', '-o', 'remount,ro', str(folder)], check=True)
        refused(outcome, Run(place, folder), str(folder), '--work-dir', arguments=())


@fault('sigint-twice', 'Ctrl-C twice, two processes')
def sigint_twice(place: Place, folder: Path, outcome: Outcome) -> None:
    run = Run(place, folder, 2, {'default_hooks.logger.interval': 1}).start()
    run.wait_for(13)
    pids = rank_pids(run).values()
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.kill(run.process.pid, signal.SIGINT)
    outcome.status = run.wait(30)
    outcome.saw = run.last_line()
    check(outcome, outcome.status in (130, 75), 'neither at once nor saved')
    time.sleep(1)
    check(outcome, not any(map(command_line, pids)), 'processes live on')
    finish(run, outcome)


@fault('nan-weight', 'a checkpoint to start from with a NaN')
def nan_weight(place: Place, folder: Path, outcome: Outcome) -> None:
    source = place.reference(1, {})
    content = dict(state_dict=read_checkpoint(source)['state_dict'])
    content['state_dict']['backbone.stages.0.0.dwconv.bias'][0] = float('nan')
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix('.pth')
    write_checkpoint(content, path)
    options = {
        'load_from': path,
        'default_hooks.non_finite.type': 'convnext_mm.NonFiniteHook',
        'default_hooks.non_finite.limit': 5,
    }
    run = Run(place, folder, 1, options)
    refused(outcome, run, '5 steps in a row', 'nonfinite_iter_5', arguments=())
    check(outcome, not list(folder.glob('iter_*')), 'it was saved')


for name, what, options, words in (
    (
        'head',
        'another head',
        (
            'configs/demo/upernet_convnext-atto_shapes.py',
            'model.decode_head.channels=96',
        ),
        ('size mismatch', 'decode_head'),
    ),
    (
        'task',
        'the config of a detector',
        ('configs/demo/mask-rcnn_convnext-atto_shapes.py',),
        ('decode_head',),
    ),
):

    @fault(f'test-other-{name}', f'test.py with {what}')
    def tested(
        place: Place, folder: Path, outcome: Outcome, options=options, words=words
    ) -> None:
        config, *settings = options
        done = subprocess.run(
            [
                *(sys.executable, 'tools/test.py', config),
                *(place.reference(1, {}), '--work-dir', folder),
                *('--data-root', place.data, '--cfg-options'),
                *(f'{key}={value}' for key, value in NO_WORKERS.items()),
                *settings,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        outcome.status, outcome.saw = done.returncode, last_said(done.stderr)
        check(outcome, outcome.status == 1, 'not status 1')
        for word in words:
            check(outcome, word in outcome.saw, f'{word!r} is not said')


HOOK = """
import os
import signal
import time
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class FaultHook(Hook):
    def {method}(self, runner, batch_idx, data_batch=None):
        first = runner.work_dir + '/first'
        if runner.iter == 12 and get_rank() == {rank} and not os.path.exists(first):
            open(first, 'w').close()
            {action}
"""


def with_hook(run: Run, method: str, rank: int, action: str) -> None:
    """Has a process of a run do something once, in or after step 12."""
    module = run.folder.with_suffix('.modules')
    module.mkdir(parents=True, exist_ok=True)
    (module / 'fault_hook.py').write_text(
        HOOK.format(method=method, rank=rank, action=action)
    )
    config = module / 'fault.py'
    config.write_text(
        f"_base_ = '{ROOT / CONFIG}'\n"
        "custom_imports = dict(imports='fault_hook')\n"
        "custom_hooks = [dict(type='FaultHook')]\n"
    )
    run.env['PYTHONPATH'] = f'{module}:{ROOT}'
    run.config = str(config)


def interrupt_validation(processes: int) -> Callable[[Place, Path, Outcome], None]:
    def inject(place: Place, folder: Path, outcome: Outcome) -> None:
        run = Run(place, folder, processes)
        # A launcher passes on what it gets.
        target = 'os.getpid()' if processes == 1 else 'os.getppid()'
        with_hook(run, 'before_val_iter', 0, f'os.kill({target}, signal.SIGTERM)')
        run.start()
        stopped_and_resumed(run, outcome, 'iter_12.pth is saved')
        # After steps 12 and 24.
        whole = run.output().count('mIoU: ')
        check(outcome, whole == 2, f'{whole} validations instead of 2')

    return inject


for name, processes in (('one process', 1), ('two processes', 2)):
    fault(
        f'sigterm-validation-{name.replace(" ", "-")}',
        f'SIGTERM while validating after step 12, {name}',
    )(interrupt_validation(processes))


@fault('stuck-rank', 'process 1 of 2 in an endless loop in step 13')
def stuck_rank(place: Place, folder: Path, outcome: Outcome) -> None:
    options = {
        'default_hooks.stall.type': 'convnext_mm.StallHook',
        'default_hooks.stall.stalled_seconds': 20,
    }
    run = Run(place, folder, 2, options)
    with_hook(run, 'before_train_iter', 1, 'while True: time.sleep(0.1)')
    run.start()
    outcome.status = run.wait()
    lines = [x for x in run.output().splitlines() if 'restart 1 of 3' in x]
    outcome.saw = lines[-1] if lines else run.last_line()
    check(outcome, 'process 1 on' in outcome.saw, 'not named')
    stacks = folder / 'stacks/rank_1.txt'
    check(
        outcome, stacks.exists() and 'fault_hook' in stacks.read_text(), 'not in stacks'
    )
    run.given = {}
    finish(run, outcome, resume=False)


@fault('timeout', 'process 1 of 2 stopped, only env_cfg.dist_cfg.timeout=20')
def timeout(place: Place, folder: Path, outcome: Outcome) -> None:
    options = {'env_cfg.dist_cfg.timeout': 20, 'default_hooks.stall': None}
    run = Run(place, folder, 2, options, env=dict(MAX_RESTARTS='0')).start()
    run.wait_for(13)
    stopped = rank_pids(run)[1]
    signal_to(stopped, signal.SIGSTOP)
    start = time.monotonic()
    outcome.status = run.wait(120)
    check(outcome, time.monotonic() - start < 90, 'the timeout was not followed')
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 1, 'not status 1')
    finish(run, outcome)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them: 10.77.0.1 and .2."""
    names = ('convnext0', 'convnext1')

    def ip(*words: str) -> None:
        subprocess.run(['ip', *words], check=True)

    for name in names:
        subprocess.run(['ip', 'netns', 'del', name], stderr=subprocess.DEVNULL)
        ip('netns', 'add', name)
    try:
        ip('link', 'add', 'cable0', 'type', 'veth', 'peer', 'name', 'cable1')
        for number, name in enumerate(names):
            ip('link', 'set', f'cable{number}', 'netns', name)
            inside = ('-n', name)
            ip(
                *inside,
                'addr',
                'add',
                f'10.77.0.{number + 1}/24',
                'dev',
                f'cable{number}',
            )
            ip(*inside, 'link', 'set', f'cable{number}', 'up')
            ip(*inside, 'link', 'set', 'lo', 'up')
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name])


@contextmanager
def on_hosts(place: Place, folder: Path, nodes: str = '2') -> Iterator[list[Run]]:
    """A run with a process on each of two hosts, which has made nine steps."""
    options = {
        'default_hooks.stall.type': 'convnext_mm.StallHook',
        'default_hooks.stall.frozen_seconds': 15,
    }
    with two_hosts() as names:
        runs = []
        for number, name in enumerate(names):
            env = dict(
                NNODES=nodes,
                NODE_RANK=str(number),
                MASTER_ADDR='10.77.0.1',
                PORT='29511',
            )
            run = Run(place, folder, 2, options, env)
            run.log = folder.with_suffix(f'.host{number}.log')
            run.log.unlink(missing_ok=True)
            command = run.command()
            command[3] = '1'
            run.command = lambda *_, c=command, n=name: ['ip', 'netns', 'exec', n, *c]
            runs.append(run.start())
        runs[0].wait_for(9)
        yield runs
        for run in runs:
            run.given = {}


def end_hosts(runs: list[Run], outcome: Outcome, restarts: bool) -> None:
    """Both hosts must come to the end of the run."""
    statuses = [run.wait(600) for run in runs]
    outcome.status = max(statuses)
    lines = [x for x in runs[0].output().splitlines() if 'restart 1 of 3' in x]
    outcome.saw = lines[-1] if lines else 'nothing'
    check(outcome, statuses == [0] * len(runs), f'ended with {statuses}')
    check(outcome, bool(lines) is restarts, 'restarts')


@fault('two-hosts', 'nothing: two hosts with a process each')
def hosts(place: Place, folder: Path, outcome: Outcome) -> None:
    with on_hosts(place, folder) as runs:
        end_hosts(runs, outcome, restarts=False)
    finish(runs[0], outcome, resume=False)


@fault('two-hosts-cut', 'one of two hosts cut off for 40 seconds')
def hosts_cut(place: Place, folder: Path, outcome: Outcome) -> None:
    with on_hosts(place, folder) as runs:
        link = 'ip -n convnext1 link set cable1'.split()
        subprocess.run([*link, 'down'], check=True)
        time.sleep(40)
        subprocess.run([*link, 'up'], check=True)
        end_hosts(runs, outcome, restarts=True)
    finish(runs[0], outcome, resume=False)


@fault('two-hosts-one-lost', 'one of two hosts killed, NNODES=1:2')
def host_lost(place: Place, folder: Path, outcome: Outcome) -> None:
    with on_hosts(place, folder, nodes='1:2') as runs:
        first, second = runs
        second.kill_all()
        second.wait()
        end_hosts([first], outcome, restarts=True)
    said = 'Saved with 2 processes of 2 images, now 1 of 2: goes on behind sample'
    check(outcome, said in first.output(), 'not said')
    check(outcome, (folder / f'iter_{STEPS}.pth').exists(), 'not to the end')


@fault('image-deleted', 'an image deleted while training')
def image_deleted(place: Place, folder: Path, outcome: Outcome) -> None:
    own = Place(folder.with_suffix('.place'))
    run = Run(own, folder).start()
    run.wait_for(5)
    image = own.data / 'images/training/00003.png'
    content = image.read_bytes()
    image.unlink()
    outcome.status = run.wait()
    outcome.saw = run.last_line()
    check(outcome, outcome.status == 1, 'not status 1')
    check(outcome, image.name in outcome.saw, 'the image is not named')
    image.write_bytes(content)
    run.place = place
    finish(run, outcome)


@fault('image-deleted-budget', 'the same with max_unreadable_images=1')
def image_deleted_budget(place: Place, folder: Path, outcome: Outcome) -> None:
    own = Place(folder.with_suffix('.place'))
    run = Run(own, folder, 1, {'max_unreadable_images': 1}).start()
    run.wait_for(5)
    (own.data / 'images/training/00003.png').unlink()
    outcome.status = run.wait()
    lines = [x for x in run.output().splitlines() if '00003.png' in x]
    outcome.saw = lines[-1] if lines else run.last_line()
    check(outcome, outcome.status == 0, 'not status 0')
    check(outcome, bool(lines), 'the image is not named')


def run_faults(names: list[str], folder: Path) -> list[Outcome]:
    """Injects them one after the other, and tells how it goes."""
    place = Place(folder)
    outcomes = []
    console = Console()
    for number, name in enumerate(names, 1):
        what, function = FAULTS[name]
        outcome = Outcome(name, what)
        work = folder / 'runs' / name
        shutil.rmtree(work, ignore_errors=True)
        work.parent.mkdir(parents=True, exist_ok=True)
        work.with_suffix('.log').unlink(missing_ok=True)
        start = time.monotonic()
        try:
            function(place, work, outcome)
        except Exception as error:
            outcome.problems.append(f'{type(error).__name__}: {error}')
        finally:
            kill_runs_in(work)
        outcome.seconds = round(time.monotonic() - start, 1)
        outcome.saw = re.sub(r'^\d\d/\d\d [\d:]+ - mmengine - ', '', outcome.saw)
        outcome.saw = outcome.saw.replace(str(folder), '...')
        outcomes.append(outcome)
        console.print(
            f'[{number}/{len(names)}] {name}: '
            + ('; '.join(outcome.problems)[:1500] or 'good')
            + f' ({outcome.seconds} s, lost {outcome.steps_lost}, differs by '
            f'{outcome.difference})',
            markup=False,
        )
    return outcomes


def write(outcomes: list[Outcome]) -> None:
    """Raw results, and their table in the page."""
    content: dict[str, Any] = dict(
        command='python tools/maintenance/inject_faults.py --write',
        machine=machine(),
        steps=STEPS,
        faults=[asdict(outcome) for outcome in outcomes],
    )
    path = ROOT / 'benchmarks' / 'faults.json'
    if path.exists():
        kept = {
            entry['name']: entry for entry in json.loads(path.read_text())['faults']
        }
        kept.update((entry['name'], entry) for entry in content['faults'])
        content['faults'] = [kept[name] for name in FAULTS if name in kept]
    path.write_text(json.dumps(content, indent=1) + '\n')
    lines = [
        '| fault | status | steps made again | difference | what the user saw |',
        '| --- | --- | --- | --- | --- |',
    ]
    for outcome in (Outcome(**entry) for entry in content['faults']):
        saw = outcome.saw.replace('|', '/')
        cells = (
            outcome.fault + (' **(not as it must be)**' if outcome.problems else ''),
            '' if outcome.status is None else outcome.status,
            '' if outcome.steps_lost is None else outcome.steps_lost,
            '' if outcome.difference is None else f'{outcome.difference:g}',
            saw if len(saw) < SHOWN else f'{saw[:SHOWN]} ...',
        )
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    page = ROOT / 'docs' / 'reliability.md'
    before, mark, _ = page.read_text().partition(MARK)
    page.write_text(before + mark + '\n\n' + '\n'.join(lines) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='*', help='faults to inject (all)')
    parser.add_argument('--list', action='store_true', help='name the faults')
    parser.add_argument('--folder', type=Path, help='for runs (a temporary one)')
    parser.add_argument(
        '--write',
        action='store_true',
        help='write results and page; faults that are not injected keep theirs',
    )
    args = parser.parse_args()
    if args.list:
        table = Table('name', 'fault')
        for name, (what, _) in FAULTS.items():
            table.add_row(name, what)
        Console().print(table)
        return
    unknown = [name for name in args.names if name not in FAULTS]
    if unknown:
        parser.error(f'no such fault: {unknown[0]}; --list names them')
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = run_faults(
            args.names or list(FAULTS), (args.folder or Path(temporary)).resolve()
        )
    bad = [outcome for outcome in outcomes if outcome.problems]
    print(f'{len(outcomes) - len(bad)} of {len(outcomes)} as they must be')
    if args.write:
        write(outcomes)
    sys.exit(bool(bad))


if __name__ == '__main__':
    main()
