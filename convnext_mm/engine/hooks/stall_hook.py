"""Who stands still, when a distributed run does."""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook

from convnext_mm.engine import supervision
from convnext_mm.engine.errors import ConfigError
from convnext_mm.registry import HOOKS

BEAT_SECONDS = 5
FIRST_BEAT_SECONDS = 0.2  # until the others were heard of
JOIN_SECONDS = 60
NCCL_SECONDS, GLOO_SECONDS = 600, 1800  # after which PyTorch gives up waiting
VERDICT = 'verdict'


@HOOKS.register_module()
class StallHook(Hook):
    """Ends a distributed run in which a process does not answer or nothing moves,
    names the process, and writes the stacks of all that live.

    A thread of each process tells the others, through a store beside the one that
    processes meet in, how far it is. Every process writes ``stacks/rank_R.txt`` in
    the work folder and ends with status 76.

    Args:
        frozen_seconds: A process that says nothing for so long does not answer: it
            was stopped, or its machine is gone.
        stalled_seconds: So long nothing may move, in training or validation; by
            default 0.9 of the time that processes wait for each other,
            ``env_cfg.dist_cfg.timeout``.

    Raises:
        ConfigError: One is not above the time between two beats.
    """

    priority = 'LOWEST'

    def __init__(
        self, frozen_seconds: float = 120, stalled_seconds: float | None = None
    ) -> None:
        for name, value in (
            ('frozen_seconds', frozen_seconds),
            ('stalled_seconds', stalled_seconds),
        ):
            if value is not None and value <= BEAT_SECONDS:
                raise ConfigError(
                    f'StallHook: {name} must be above {BEAT_SECONDS}, got {value}'
                )
        self.frozen_seconds = frozen_seconds
        self.stalled_seconds = stalled_seconds
        self._events = 0  # hooks passed: how far this process is
        self._doing = 'starts'
        self._seen: dict[int, tuple[dict, float]] = {}  # state, when it came
        self._verdict: str | None = None
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def before_train(self, runner: Any) -> None:
        """Starts to watch."""
        self.rank, self.world_size = get_dist_info()
        if self.world_size == 1 or 'MASTER_ADDR' not in os.environ:
            return
        self._work_dir = Path(runner.work_dir)
        if self.stalled_seconds is None:
            dist_cfg = (runner.cfg.get('env_cfg') or {}).get('dist_cfg') or {}
            default = (
                NCCL_SECONDS if dist_cfg.get('backend') == 'nccl' else GLOO_SECONDS
            )
            # Before the others give up waiting, without a name.
            self.stalled_seconds = 0.9 * float(dist_cfg.get('timeout') or default)
        # Threads that share a connection would wait for each other.
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ['MASTER_ADDR'],
            int(os.environ['MASTER_PORT']),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=2 * BEAT_SECONDS),
        )
        prefix = f'stall/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
        self._store = torch.distributed.PrefixStore(  # type: ignore[attr-defined]
            prefix, store
        )
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._tell_and_ask, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def after_train(self, runner: Any) -> None:
        """Stops watching."""
        self.stop()

    def stop(self) -> None:
        """Stops watching, however the run ended."""
        self._ended.set()
        for thread in self._threads:
            # Python aborts the process where it ends while a thread asks the store,
            # which may take until process 0 is gone.
            thread.join(JOIN_SECONDS)

    def _at(self, runner: Any, doing: str) -> None:
        self._events += 1
        self._doing = f'{doing} of step {runner.iter + 1}'

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Notes how far this process is, as all below."""
        self._at(runner, 'is in the computation')

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Data comes next."""
        self._at(runner, 'is behind the computation')

    def after_val_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """In validation."""
        self._at(runner, 'is in a validation before the computation')

    def after_val_epoch(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Metrics are there."""
        self._at(runner, 'is behind a validation before the computation')

    def _tell_and_ask(self) -> None:
        """Exchanges states with the others. A call may wait for ever where the
        process that holds the store is stopped, so another thread judges."""
        beats = 0
        # Process 0 looks at all, the others only at process 0.
        others = range(self.world_size) if self.rank == 0 else (0,)
        while not self._ended.wait(
            BEAT_SECONDS if len(self._seen) == len(others) else FIRST_BEAT_SECONDS
        ):
            beats += 1
            with contextlib.suppress(torch.distributed.DistError, RuntimeError):
                self._store.set(str(self.rank), json.dumps(self._state(beats)))
                if self._store.check([VERDICT]):
                    self._verdict = self._store.get(VERDICT).decode()
                for rank in others:
                    self._look(rank)
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):
            self._store.set(str(self.rank), json.dumps(self._state(beats)))

    def _watch(self) -> None:
        moved = time.monotonic()
        before: list[int] = []
        while not self._ended.wait(1):
            seen = dict(self._seen)
            events = [state['events'] for state, _ in seen.values()]
            if events != before:
                before, moved = events, time.monotonic()
            verdict = self._verdict or self._judge(seen, time.monotonic() - moved)
            if verdict is not None:
                self._end(verdict)

    def _state(self, beats: int) -> dict[str, Any]:
        return dict(
            beats=beats,
            events=self._events,
            ended=self._ended.is_set(),
            doing=self._doing,
            pid=os.getpid(),
            host=socket.gethostname(),
        )

    def _look(self, rank: int) -> None:
        """Reads a state, and when it last changed."""
        if not self._store.check([str(rank)]):
            return
        state = json.loads(self._store.get(str(rank)))
        if rank not in self._seen or self._seen[rank][0] != state:
            self._seen[rank] = state, time.monotonic()

    def _judge(self, seen: dict[int, tuple[dict, float]], still: float) -> str | None:
        now = time.monotonic()
        if any(state['ended'] for state, _ in seen.values()):
            return None  # one after the other
        for rank, (state, when) in seen.items():
            if now - when > self.frozen_seconds:
                return (
                    f'process {rank} on {state["host"]} (pid {state["pid"]}) does not '
                    f'answer since {now - when:.0f} s{_why(state)}; it '
                    f'{state["doing"]}'
                )
        if self.rank == 0 and self.stalled_seconds and still > self.stalled_seconds:
            last = min(state['events'] for state, _ in seen.values())
            behind = [
                f'process {rank} on {state["host"]} {state["doing"]}'
                for rank, (state, _) in sorted(seen.items())
                if state['events'] == last
            ]
            return (
                f'nothing has moved for {still:.0f} s, and does not answer: '
                + '; '.join(behind[:8])
            )
        return None

    def _end(self, verdict: str) -> None:
        """Leaves the stacks and the verdict behind, and ends this process."""
        folder = self._work_dir / 'stacks'
        # Neither a store nor a disk that does not answer may keep it.
        for action in (
            partial(self._tell, verdict),
            partial(self._write_stacks, folder, verdict),
        ):
            thread = threading.Thread(target=action, daemon=True)
            thread.start()
            thread.join(BEAT_SECONDS)
        try:
            supervision.report(f'{verdict}; stacks are in {folder}', mendable=True)
            if self.rank == 0:
                print(f'error: {verdict}', flush=True)
                time.sleep(2 * BEAT_SECONDS)  # it may hold what the others ask
        finally:
            os._exit(supervision.STALLED)

    def _write_stacks(self, folder: Path, verdict: str) -> None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f'rank_{self.rank}.txt', 'w') as file:
                file.write(f'{verdict}\nprocess {self.rank} {self._doing}\n\n')
                faulthandler.dump_traceback(file)

    def _tell(self, verdict: str) -> None:
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):
            self._store.set(VERDICT, verdict)


def _why(state: dict[str, Any]) -> str:
    """What the system says of a process of this machine."""
    status = Path(f'/proc/{state["pid"]}/status')
    if state['host'] != socket.gethostname() or not status.exists():
        return ''
    try:
        lines = dict(line.split(':', 1) for line in status.read_text().splitlines())
    except OSError:  # it has just ended
        return ''
    return f', its state is {lines.get("State", "unknown").strip()}'
