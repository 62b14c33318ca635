"""Starts the processes of this machine through torchrun's agent, passes signals on
to them, and starts them again after faults that a restart can mend.

``python -m convnext_mm.engine.launcher SCRIPT [ARGUMENTS]``; settings come from the
environment, as those of OpenMMLab's ``dist_train.sh`` do.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, SimpleNamespace

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing import api as torch_processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from .agreement import REQUEUE, SIGNALS
from .errors import ConfigError, last_lines
from .network import check_port, free_port, own_address
from .supervision import FOLDER, LAUNCHER, STALLED, read_reports

JOIN_SECONDS = 1800  # for machines to find each other, again after one was lost
REJOIN_SECONDS = 300  # for machine 0, which was there, to answer again
START_SECONDS = 60  # in which a process tells its id
LOG = 'launcher.log'
# What a process reports that waited in vain for another one, which the agent kills.
WAITED = ('does not answer', 'Timed out', 'timeout')


@dataclass(frozen=True)
class Settings:
    """Which processes to start.

    Args:
        processes: On this machine.
        nodes: Machines, ``'2'``, or from two to four, ``'2:4'``.
        node_rank: Of this machine; 0 is where the others find each other.
        address: Of machine 0.
        port: There; 0: any that is free.
        max_restarts: After faults that a restart can mend.
    """

    processes: int
    nodes: str = '1'
    node_rank: int = 0
    address: str = '127.0.0.1'
    port: int = 0
    max_restarts: int = 3

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> 'Settings':
        """From ``GPUS``, ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``, ``PORT`` and
        ``MAX_RESTARTS``.

        Raises:
            ConfigError: One is no such number.
        """
        nodes = env.get('NNODES') or '1'
        if not all(part.isdigit() and int(part) for part in nodes.split(':')[:2]):
            raise ConfigError(
                f'NNODES is a number of machines, such as 2, or a range, such as 2:4; '
                f'got {nodes!r}'
            )
        return cls(
            processes=_number(env, 'GPUS', 1, 1),
            nodes=nodes,
            node_rank=_number(env, 'NODE_RANK', 0),
            address=env.get('MASTER_ADDR') or cls.address,
            port=_number(env, 'PORT', 0 if nodes == '1' else 29500),
            max_restarts=_number(env, 'MAX_RESTARTS', cls.max_restarts),
        )

    @property
    def is_single(self) -> bool:
        return self.nodes == '1'


def _number(env: Mapping[str, str], name: str, default: int, lowest: int = 0) -> int:
    text = env.get(name) or str(default)
    if not text.isdigit() or int(text) < lowest:
        raise ConfigError(f'{name} is a whole number from {lowest} on, got {text!r}')
    return int(text)


class Launcher:
    """The processes of one run on this machine.

    Args:
        command: A Python script and its arguments.
        settings: Which processes.
    """

    def __init__(self, command: Sequence[str], settings: Settings) -> None:
        self.command = list(command)
        self.settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix='convnext_mm-launch-'))
        (self.folder / LAUNCHER).write_text(str(os.getpid()))
        self._signal = 0
        self._signal_at = 0.0
        self._told: set[Path] = set()  # files of process ids
        self._failure: BaseException | None = None

    def run(self) -> int:
        """Runs to the end, and gives the exit status."""
        handlers = {n: signal.signal(n, self._pass_on) for n in SIGNALS}
        log = logging.FileHandler(self.folder / LOG)
        logger = logging.getLogger('torch.distributed.elastic')
        logger.addHandler(log)
        logger.propagate = False
        try:
            return self._attempts()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            log.close()
            logger.removeHandler(log)
            self._keep_logs()

    def _attempts(self) -> int:
        last = ''
        for attempt in range(self.settings.max_restarts + 1):
            failure = self._attempt(attempt)
            if failure is None:
                return 0
            if isinstance(failure, ChildFailedError) and any(
                f.exitcode == REQUEUE for f in failure.failures.values()
            ):
                return REQUEUE
            message, mendable = self._explain(failure)
            if self._signal:
                _say(f'{message}; the run was being stopped.')
                return 128 + self._signal
            if not mendable or attempt == self.settings.max_restarts or message == last:
                again = ', the second time' if message == last else ''
                _say(f'error: {message}{again}')
                return 1
            last = message
            _say(
                f'{message}: restart {attempt + 1} of {self.settings.max_restarts}, '
                'from the last checkpoint'
            )
        return 1

    def _attempt(self, number: int) -> BaseException | None:
        """Starts the processes and waits; gives what went wrong."""
        for old in [*self.folder.glob('*.json'), *self.folder.glob('*.pid')]:
            old.unlink()
        os.environ[FOLDER] = str(self.folder)
        self._failure = None
        # In the main thread the agent would take signals for itself, and end the
        # processes before they can save.
        agent = threading.Thread(target=self._agent, args=(number,), daemon=True)
        agent.start()
        while agent.is_alive():
            agent.join(0.2)
            if self._signal:  # also to those that were only starting
                self._tell_processes(self._signal)
                waited = time.monotonic() - self._signal_at
                if waited > START_SECONDS and not self._told:
                    return InterruptedError('nothing was running yet')
        return self._failure

    def _agent(self, number: int) -> None:
        deadline = time.monotonic() + (REJOIN_SECONDS if number else JOIN_SECONDS)
        while True:
            try:
                elastic_launch(self._config(number), sys.executable)(
                    '-u', *self.command
                )
            except RendezvousConnectionError as error:
                if time.monotonic() < deadline and not self._signal:
                    time.sleep(1)
                    continue
                self._failure = error
            except BaseException as error:
                self._failure = error
            return

    def _config(self, attempt: int) -> LaunchConfig:
        settings = self.settings
        lowest, _, highest = settings.nodes.partition(':')
        quiet = dict.fromkeys(range(1, settings.processes), Std.ALL)
        single = settings.is_single
        return LaunchConfig(
            min_nodes=int(lowest),
            max_nodes=int(highest or lowest),
            nproc_per_node=settings.processes,
            run_id=f'convnext_mm-{attempt}',
            rdzv_backend='c10d',
            rdzv_endpoint=f'{settings.address}:{settings.port}',
            rdzv_configs=dict(
                is_host=str(single or settings.node_rank == 0).lower(),
                join_timeout=JOIN_SECONDS,
                timeout=60,
            ),
            max_restarts=0,
            local_addr='127.0.0.1' if single else own_address(settings.address),
            logs_specs=DefaultLogsSpecs(
                log_dir=str(self.folder / f'attempt-{attempt}'), redirects=quiet
            ),
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        again = self._signal == signal.SIGINT == number
        self._signal, self._signal_at = number, time.monotonic()
        self._told = set()
        self._tell_processes(signal.SIGKILL if again else number)
        if again:
            _say('Stopped at once: what came after the last checkpoint is lost.')
            self._keep_logs()
            os._exit(128 + number)

    def _tell_processes(self, number: int) -> None:
        """Signals those that do not know yet."""
        for path in set(self.folder.glob('*.pid')) - self._told:
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), number)
                self._told.add(path)

    def _explain(self, failure: BaseException) -> tuple[str, bool]:
        """A sentence, and whether a restart can mend it."""
        reports = read_reports(self.folder)
        stalled = [r for r in reports if any(s in r['message'] for s in WAITED)]
        final = [r for r in reports if not r['mendable']]
        if final or stalled:
            chosen = (final or stalled)[0]
            return f'process {chosen["rank"]}: {chosen["message"]}', chosen['mendable']
        if isinstance(failure, ChildFailedError):
            for local, child in failure.failures.items():
                # The agent itself ends the others with SIGTERM.
                if child.exitcode < 0 and child.exitcode != -signal.SIGTERM:
                    name = signal.Signals(-child.exitcode).name
                    hint = (
                        ' (out of memory, perhaps: `dmesg` tells)'
                        if name == 'SIGKILL'
                        else ''
                    )
                    return f'process {local} was ended by {name}{hint}', True
            if reports:
                return f'process {reports[0]["rank"]}: {reports[0]["message"]}', True
            rank, child = failure.get_first_failure()
            return (
                f'process {rank} ended with status {child.exitcode}; its output is in '
                f'{self._log_place()}',
                child.exitcode == STALLED,
            )
        if isinstance(failure, RendezvousConnectionError):
            return (
                f'nobody answers at {self.settings.address}:{self.settings.port}: is '
                'machine 0 (NODE_RANK=0) started, and MASTER_ADDR and PORT the same '
                'everywhere?',
                False,
            )
        return f'{type(failure).__name__}: {failure}', False

    def _log_place(self) -> Path:
        name = self.folder / 'work_dir'
        return Path(name.read_text()) / 'launcher' if name.exists() else self.folder

    def _keep_logs(self) -> None:
        """Moves the logs into the work folder, once it is known."""
        place = self._log_place()
        if place == self.folder or not self.folder.exists():
            return
        place.mkdir(parents=True, exist_ok=True)
        for item in self.folder.iterdir():
            if item.name == LOG or item.is_dir():
                target = place / f'{time.strftime("%Y%m%d_%H%M%S")}-{item.name}'
                shutil.move(str(item), target)
        shutil.rmtree(self.folder, ignore_errors=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    """
    Args:
        arguments: A script and its arguments.
    """
    # As torchrun does: threads of many processes would fight for the cores.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    # Each attempt has keys of its own.
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
    # Where it starts processes, PyTorch 2.4 registers handlers, which Python refuses
    # in a thread; those of the launcher are to stay anyway.
    torch_processes.signal = SimpleNamespace(  # type: ignore[assignment, attr-defined]
        **{**vars(signal), 'signal': lambda number, handler: None}
    )
    try:
        settings = Settings.from_environment(os.environ)
        if settings.is_single:
            port = free_port(settings.port)
            if settings.port not in (0, port):
                _say(f'Port {settings.port} is in use: {port} is taken.')
            settings = replace(settings, port=port)
        elif settings.node_rank == 0:
            check_port(settings.port)
    except ConfigError as error:
        _say(last_lines(error))
        return 2
    return Launcher(arguments, settings).run()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
