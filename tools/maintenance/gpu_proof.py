"""Checks the kernels and measures everything on a GPU machine, in parts.

Each part is a process of its own. OUT gets one json file, which is replaced whenever a
part has a new row, and log.txt: whoever ends this early has all that was measured. A
network that crashes or hangs is named, and its part goes on without it. With --tune the
times of all that the kernels are chosen from, instead.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 560  # of what is killed after 10 minutes
GROUP_S = 170  # of parts that run at once
POLL_S = 0.3
STALL_S = 100  # a part hangs that has nothing new in its file
DONE, RUNNING, FAILED, NOT_REACHED = 'done', 'running', 'failed', 'not reached'
# Imported while the worker has no part yet. What is missing is the part's to tell.
SLOW_IMPORTS = (
    *(
        'torch',
        'torchvision',
        'timm',
        'transformers.models.convnext.modeling_convnext',
        'mmpretrain.models',
    ),
    *('mmdet.models', 'mmseg.models', 'convnext_mm.apis.benchmark'),
)
TIMES = ('ms', 'times_ms', 'median_ms', 'quartiles_ms', 'share_of_floor', 'peak_bytes')


@dataclasses.dataclass
class Part:
    """What one process does, or several one after another where one crashes.

    Attributes:
        name: Of the result.
        kind: A key of ``KINDS``.
        settings: Arguments of that function.
        limit: Seconds of one process.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    limit: float = 120
    status: str = NOT_REACHED
    seconds: float = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    files: list[Path] = dataclasses.field(default_factory=list)

    def result(self) -> dict:
        """What its processes wrote; of one network the last."""
        merged: dict[str, Any] = {}
        for path in self.files:
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError):  # ended before the first row
                continue
            rows = {_key(row): row for row in merged.get('rows', ())}
            rows.update((_key(row), row) for row in found.get('rows', ()))
            skipped = {**merged.get('skipped', {}), **found.get('skipped', {})}
            merged.update(found, skipped=skipped)
            if 'rows' in found:
                merged['rows'] = list(rows.values())
        if self.kind == 'check':  # several at once: no times
            merged['rows'] = [
                {k: v for k, v in row.items() if k not in TIMES}
                for row in merged.get('rows', ())
            ]
        return dict(
            status=self.status,
            seconds=round(self.seconds, 1),
            failed={**merged.pop('skipped', {}), **self.failed},
            **merged,
        )

    def left_after(self, reason: str) -> dict | None:
        """Notes why its process ended, and returns the settings for another one
        without the network that was running; None where nothing is left to try."""
        result = self.result()
        running = (result.get('running') or '').split(', ')[0]
        networks = self.settings.get('networks', [])
        compiled = [f'{name} compiled' for name in self.settings.get('compile', ())]
        if running not in (*networks, *compiled):
            self.failed[running or 'all'] = reason
            return None
        self.failed[running] = reason
        seen = {(row['network'], row['mode']) for row in result['rows']}
        out = {name for name in self.failed if ',' not in name}
        left = [
            name
            for name in (*networks, *compiled)
            if name.removesuffix(' compiled') not in out
            and name not in out
            and any((name, mode) not in seen for mode in self.settings['mode'])
        ]
        if not left:
            return None
        return dict(
            self.settings,
            networks=[n for n in networks if n in left or f'{n} compiled' in left],
            compile=[n.removesuffix(' compiled') for n in left if n in compiled],
        )


def _key(row: dict) -> tuple:
    return row['network'], row['mode'], row['dtype']


# What is done ------------------------------------------------------------------

PEERS = ['mmpretrain', 'timm', 'torchvision', 'transformers']
COMPILED = [*PEERS, 'triton']
STAGES = dict(tiny=(96, 192, 384, 768), base=(128, 256, 512, 1024))
MAPS = ((200, 336), (100, 168), (50, 84), (25, 42))  # of 800 x 1344
CANDIDATES = 5  # the most that the tuner has of one kernel
FULL, CROP = (800, 1344), (512, 512)
STOCK = ['triton', 'mmpretrain']
LOOK = ['triton', 'triton+deploy', 'mmpretrain', 'resnet50', 'swin']


def backbone(
    name: str, limit: float = 120, kind: str = 'bench', **settings: Any
) -> Part:
    known = dict(
        mode=['train'],
        arch='tiny',
        batch=2,
        size=FULL,
        networks=['triton', 'lean', 'eager', 'paper', *PEERS],
    )
    return Part(name, kind, {**known, **settings}, limit)


def model(mode: str, dtype: str, batch: int, name: str = '', **settings: Any) -> Part:
    networks = LOOK if mode.endswith('-infer') else STOCK
    known = dict(mode=[mode], dtype=[dtype], batch=batch, networks=networks)
    words = (mode, settings.get('arch', 'tiny'), dtype, f'x{batch}', name)
    return Part('_'.join(filter(None, words)), 'bench', {**known, **settings})


def checks(arch: str, dtype: str, **settings: Any) -> list[Part]:
    """Of the whole network with each candidate, several at once: they fill the
    compilers' caches."""
    known = dict(arch=arch, dtype=[dtype], networks=['triton'], rounds=2)
    mode = settings.get('mode', ['train'])[0]
    return [
        backbone(
            f'check_{arch}_{mode}_{dtype}_{i}',
            150,
            'check',
            candidate=i,
            **{**known, **settings},
        )
        for i in range(CANDIDATES)
    ]


def kernel_checks(arch: str, dtype: str) -> list[Part]:
    """Of the block and the layers around at real widths and sizes."""
    return [
        Part(
            f'kernels_{channels}_{dtype}',
            'kernels',
            dict(shape=(2, channels, *size), dtype=dtype),
            150,
        )
        for channels, size in zip(STAGES[arch], MAPS)
    ]


def compilations(arch: str) -> list[Part]:
    """Fill inductor's cache."""
    return [
        backbone(
            f'compile_{arch}_{name}',
            150,
            'check',
            arch=arch,
            dtype=['amp'],
            networks=[name],
            compile=[name],
            rounds=2,
        )
        for name in COMPILED
    ]


def compiled(arch: str) -> Part:
    return backbone(
        f'backbone_{arch}_amp_compiled',
        arch=arch,
        dtype=['amp'],
        networks=COMPILED,
        compile=COMPILED,
    )


def proof() -> list[list[Part]]:
    """Groups, of which each one's parts run at once."""
    modes = ['train', 'infer', 'memory']
    crop = dict(batch=16, size=CROP)
    look = dict(mode=['infer'], batch=1, size=(800, 1280))
    parts: list[Part | list[Part]] = [
        [
            *checks('tiny', 'amp'),
            *kernel_checks('tiny', 'bfloat16'),
            *checks('tiny', 'bf16'),
            *compilations('tiny'),
            backbone('check_auto', kind='check', dtype=['amp'], networks=['auto']),
            # Models are compared in fp32, whatever they are timed in.
            *checks('tiny', 'fp32', mode=['infer']),
            *checks('tiny', 'amp', **look),
            *kernel_checks('tiny', 'float16'),
            *kernel_checks('tiny', 'float32'),
        ],
        backbone('backbone_tiny_amp', mode=modes, dtype=['amp']),
        model('detector', 'amp', 2),
        model('segmentor', 'amp', 2),
        backbone('backbone_tiny_amp_crop', dtype=['amp'], **crop),
        backbone(
            'backbone_tiny_amp_graphs',
            mode=['train', 'infer'],
            dtype=['amp'],
            size=CROP,
            networks=['triton', 'triton+graphs', 'mmpretrain', 'timm'],
        ),
        backbone('backbone_tiny_bf16', mode=modes, dtype=['bf16']),
        compiled('tiny'),
        model('detector-infer', 'amp', 1),
        model('segmentor-infer', 'amp', 1),
        model('cascade-infer', 'amp', 1),
        model('detector-infer', 'amp', 8),
        model('segmentor-infer', 'amp', 8),
        model('cascade-infer', 'amp', 8),
        backbone(
            'backbone_tiny_amp_largest',
            dtype=['amp'],
            networks=['triton', 'mmpretrain', 'timm'],
            fit='all',
        ),
        model('detector', 'amp', 2, name='largest', fit_gib=[24, 80]),
        model('cascade', 'amp', 2, arch='base', networks=[*STOCK, 'paper', 'swin']),
        [
            *checks('base', 'amp'),
            *kernel_checks('base', 'bfloat16'),
            *checks('base', 'bf16'),
            *compilations('base'),
        ],
        backbone('backbone_base_amp', mode=modes, arch='base', dtype=['amp']),
        backbone('backbone_base_amp_crop', arch='base', dtype=['amp'], **crop),
        backbone('backbone_base_bf16', mode=modes, arch='base', dtype=['bf16']),
        model('cascade-infer', 'amp', 1, arch='base'),
        compiled('base'),
        [*checks('tiny', 'amp-fp16'), *checks('tiny', 'fp32')],
        backbone('backbone_tiny_fp16', dtype=['amp-fp16']),
        backbone('backbone_tiny_fp32', mode=modes, dtype=['fp32']),
        model('detector', 'fp32', 2),
        model('detector-infer', 'fp32', 1),
        model('cascade-infer', 'fp32', 1),
    ]
    return [part if isinstance(part, list) else [part] for part in parts]


def tune() -> list[list[Part]]:
    return [
        [*checks('tiny', 'amp'), *checks('tiny', 'bf16'), *checks('base', 'amp')],
        *(
            [
                backbone(
                    f'tune_{arch}_{dtype}_{batch}x{size[0]}',
                    kind='tune',
                    arch=arch,
                    dtype=[dtype],
                    batch=batch,
                    size=size,
                    networks=['triton'],
                    mode=['train', 'infer'],
                    rounds=2,
                )
            ]
            for arch in STAGES
            for dtype in ('amp', 'bf16')
            for batch, size in ((2, FULL), (16, CROP))
        ),
    ]


def smoke(groups: list[list[Part]]) -> list[list[Part]]:
    """Each kind once or twice, in small, on a CPU."""
    names = (
        *('check_tiny_train_amp_0', 'kernels_96_float32', 'backbone_tiny_amp'),
        *('compile_tiny_timm', 'detector_tiny_amp_x2', 'segmentor-infer_tiny_amp_x8'),
        'tune_tiny_amp_2x800',
    )
    small = dict(
        arch='atto', batch=1, size=(32, 32), dtype=['fp32'], rounds=2, warmup=0
    )
    chosen = [[part for part in group if part.name in names] for group in groups]
    for part in (part for group in chosen for part in group):
        part.limit = 240
        if part.kind == 'kernels':
            part.settings['shape'] = (1, 8, 3, 5)
            continue
        part.settings.update(small, device='cpu')
        mode = part.settings['mode'][0]
        if part.kind in ('check', 'tune') and 'triton' in part.settings['networks']:
            part.settings.update(mode=['infer'])  # the interpreter is slow
        elif mode == 'segmentor-infer':
            part.settings.update(networks=['lean', 'lean+deploy', 'resnet50'], batch=2)
        elif mode == 'detector':
            part.settings.update(
                networks=['lean', 'mmpretrain'], size=(64, 64), batch=2
            )
        else:
            part.settings.update(networks=['lean', 'timm'], compile=[])
    return [group for group in chosen if group]


# A worker ----------------------------------------------------------------------


def work() -> None:
    """Waits for a part on standard input and does it."""
    sys.path[:0] = [str(ROOT), str(ROOT / 'tools/maintenance')]
    for name in SLOW_IMPORTS:
        try:
            __import__(name)
        except Exception as error:
            print(f'{name}: {error}', file=sys.stderr)
    order = json.loads(sys.stdin.readline() or 'null')
    if order is None:
        return
    out = Path(order['out'])
    try:
        KINDS[order['kind']](out, **order['settings'])
    except BaseException as error:
        reason = (str(error).strip().splitlines() or [''])[0]
        out.with_suffix('.reason').write_text(f'{type(error).__name__}: {reason}'[:300])
        raise
    sys.stdout.flush()
    os._exit(0)  # nothing is left that must be taken down


def bench(out: Path, fit: str | None = None, **settings: Any) -> None:
    import torch

    from convnext_mm.apis.benchmark import Settings, run

    if fit:
        settings['fit_gib'] = [torch.cuda.mem_get_info()[1] / 2**30]
    run(Settings(**{**dict(device='cuda', rounds=15), **settings}), out, out.stem)


def check(out: Path, candidate: int | None = None, **settings: Any) -> None:
    """A few steps, with one candidate of each kernel."""
    if candidate is not None:
        from convnext_mm.ops.triton import launch

        launch.fastest = lambda key, rows, candidates, run: candidates[
            candidate % len(candidates)
        ]
    bench(out, **settings)


def kernels(out: Path, shape: tuple[int, ...], dtype: str) -> None:
    """The block and the layers around, with each candidate of each kernel."""
    import torch

    import check_kernels
    from convnext_mm.ops.triton import launch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    counts, number = {1}, 0

    def choose(key: Any, rows: int, candidates: Any, run: Any) -> Any:
        counts.add(len(candidates))
        return candidates[number % len(candidates)]

    launch.fastest = choose
    records: list[dict] = []

    def add(record: dict) -> None:
        records.append(dict(candidate=number, **record))
        replace(out, dict(records=records))

    kind = getattr(torch, dtype)
    for name in ('norm', 'downsample'):
        add(check_kernels.check_layer(name, tuple(shape), kind))
    while number < max(counts):
        for version in (1, 2):
            add(check_kernels.check_block(tuple(shape), kind, 7, version, 1))
        number += 1
    if bad := [record for record in records if not record['ok']]:
        raise ArithmeticError(f'{len(bad)} of {len(records)} checks failed')


def times(out: Path, **settings: Any) -> None:
    """Of each candidate of each kernel that a step starts."""
    import triton

    from convnext_mm.ops.triton import launch

    records: dict[str, dict] = {}
    best: dict[str, Any] = {}

    def measure(run: Any, candidate: Any) -> float:
        if settings.get('device') != 'cpu':
            return triton.testing.do_bench(lambda: run(candidate), return_mode='median')
        start = time.perf_counter()
        run(candidate)
        return 1e3 * (time.perf_counter() - start)

    def fastest(key: tuple, rows: int, candidates: Any, run: Any) -> Any:
        name = f'{rows} {key}'
        if name not in best:
            found = []
            for candidate in candidates:
                entry = dict(candidate=repr(candidate))
                try:
                    entry['ms'] = measure(run, candidate)
                except Exception as error:  # too large for the GPU, or out of memory
                    entry['error'] = f'{type(error).__name__}: {error}'[:200]
                found.append(entry)
            ms = [entry.get('ms', float('inf')) for entry in found]
            best[name] = candidates[ms.index(min(ms))]
            records[name] = dict(rows=rows, key=[*map(str, key)], candidates=found)
            replace(out, dict(records=[*records.values()]))
        return best[name]

    launch.fastest = fastest
    with tempfile.TemporaryDirectory() as scratch:
        bench(Path(scratch) / 'unused.json', **settings)


KINDS = dict(bench=bench, check=check, kernels=kernels, tune=times)


# Who starts them ---------------------------------------------------------------


def replace(path: Path, content: dict) -> None:
    partial = path.with_name(f'.{path.name}.part')
    partial.write_text(json.dumps(content, indent=1) + '\n')
    os.replace(partial, path)


class Proof:
    """Runs parts and keeps their results.

    Args:
        out: The json file.
        log: What workers print.
        facts: Of the file, beside the parts.
        environment: Of workers.
        scratch: For what the parts write.
        limit: Seconds for all.
        worker: The command of one.
    """

    def __init__(
        self,
        out: Path,
        log: IO,
        facts: dict,
        environment: dict[str, str],
        scratch: Path,
        limit: float,
        worker: tuple[str, ...] = (
            sys.executable,
            '-W',
            'ignore',
            __file__,
            '--worker',
        ),
    ) -> None:
        self.out, self.log, self.facts = out, log, facts
        self.environment, self.scratch, self.worker = environment, scratch, worker
        self.parts: list[Part] = []
        self.spares: list[subprocess.Popen] = []
        self.active: dict[int, tuple[Part, subprocess.Popen, float]] = {}
        self.start = time.monotonic()
        self.end = self.until = self.start + limit
        self.seen: list = []

    def spare(self) -> subprocess.Popen:
        """A worker that imports, until it is given a part."""
        return subprocess.Popen(
            self.worker,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=self.environment,
            cwd=ROOT,
            text=True,
            start_new_session=True,
        )

    def run(self, groups: list[list[Part]], workers: int) -> None:
        self.parts = [part for group in groups for part in group]
        self.save()
        for i, group in enumerate(groups):
            following = len(groups[i + 1]) if i + 1 < len(groups) else 0
            self.run_group(group, workers, following)
            print(*(f'{p.status}: {p.name}' for p in group), sep='\n', flush=True)

    def run_group(self, group: list[Part], workers: int, following: int) -> None:
        waiting = [(part, part.settings) for part in group]
        self.until = self.end
        if len(group) > 1:
            self.until = min(self.end, time.monotonic() + GROUP_S)
        while waiting or self.active:
            time_left = time.monotonic() < self.until
            while waiting and len(self.active) < workers and time_left:
                wanted = min(workers - len(self.active), len(waiting))
                while len(self.spares) < wanted:
                    self.spares.append(self.spare())
                self.begin(*waiting.pop(0))
                if not waiting and following:
                    self.spares.append(self.spare())
            if not time_left:
                waiting.clear()
            time.sleep(POLL_S)
            for key, (part, worker, since) in [*self.active.items()]:
                reason = self.why_over(part, worker, since)
                if reason is None:
                    continue
                del self.active[key]
                kill(worker)
                part.seconds += time.monotonic() - since
                part.status = FAILED if reason else DONE
                left = part.left_after(reason) if reason else None
                if left is not None:
                    waiting.append((part, left))
            self.save()

    def begin(self, part: Part, settings: dict) -> None:
        worker = self.spares.pop(0)
        path = self.scratch / f'{part.name}.{len(part.files)}.json'
        part.files.append(path)
        part.status = RUNNING
        order = dict(kind=part.kind, settings=settings, out=str(path))
        try:
            worker.stdin.write(json.dumps(order) + '\n')
            worker.stdin.close()
        except OSError:  # it has ended, and says so
            pass
        self.active[worker.pid] = part, worker, time.monotonic()

    def why_over(
        self, part: Part, worker: subprocess.Popen, since: float
    ) -> str | None:
        """'' where a worker is through, None where it is not, else what happened."""
        code, now, path = worker.poll(), time.monotonic(), part.files[-1]
        if code == 0:
            return ''
        if code is not None:
            reason = path.with_suffix('.reason')
            how = f'signal {-code}' if code < 0 else f'exit code {code}'
            return reason.read_text() if reason.exists() else f'{how}, see log.txt'
        if now > self.until:
            return 'no time was left'
        if now - since > part.limit:
            return f'took more than {part.limit:g} s'
        if part.kind == 'bench':  # others are compiling, or as good as
            quiet = now - since
            with contextlib.suppress(OSError):  # no file yet
                quiet = min(quiet, time.time() - path.stat().st_mtime)
            if quiet > STALL_S:
                return f'did nothing for {STALL_S:g} s'
        return None

    def save(self) -> None:
        """Where something is new."""
        seen = [
            (p.status, [f.stat().st_mtime_ns for f in p.files if f.exists()])
            for p in self.parts
        ]
        if seen != self.seen:
            self.seen = seen
            seconds = round(time.monotonic() - self.start, 1)
            results = {part.name: part.result() for part in self.parts}
            replace(self.out, dict(self.facts, seconds=seconds, parts=results))

    def close(self) -> None:
        for worker in (
            *self.spares,
            *(worker for _, worker, _ in self.active.values()),
        ):
            kill(worker)


def kill(worker: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def commit() -> str | None:
    """Of the checkout, None outside of git."""
    command = ['git', 'rev-parse', 'HEAD']
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() or None
    return None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, metavar='OUT', help='folder for the results')
    parser.add_argument('--tune', action='store_true', help='time all candidates')
    parser.add_argument(
        '--smoke', action='store_true', help='in small, on a CPU: measures nothing'
    )
    parser.add_argument(
        '--only', metavar='REGEX', default='', help='parts that have it in their name'
    )
    parser.add_argument(
        '--limit', type=float, default=LIMIT_S, help=f'seconds for all ({LIMIT_S})'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    groups = tune() if args.tune else proof()
    environment = dict(os.environ)
    if args.smoke:
        groups = smoke(groups)
        environment['TRITON_INTERPRET'] = '1'
    groups = [[p for p in group if re.search(args.only, p.name)] for group in groups]
    args.out.mkdir(parents=True, exist_ok=True)
    words = [*sys.argv[1:]] if argv is None else argv
    facts = dict(
        command=shlex.join(['tools/maintenance/gpu_proof.py', *words]),
        commit=commit(),
        smoke=args.smoke,
    )
    out = args.out / ('tune.json' if args.tune else 'proof.json')
    with (
        tempfile.TemporaryDirectory() as scratch,
        open(args.out / 'log.txt', 'w') as log,
    ):
        proof_ = Proof(out, log, facts, environment, Path(scratch), args.limit)
        try:
            # In the interpreter one part has a core for itself.
            proof_.run(
                [group for group in groups if group],
                1 if args.smoke else os.cpu_count() or 1,
            )
        finally:
            proof_.close()
            proof_.save()
    bad = [part for part in proof_.parts if part.status != DONE or part.failed]
    for part in proof_.parts:
        for name, reason in part.result()['failed'].items():
            print(f'{part.name}: {name}: {reason}')
    return 1 if bad else 0


if __name__ == '__main__':
    if sys.argv[1:] == ['--worker']:
        work()
    else:
        sys.exit(main())
