"""A Python that has already imported what is slow to import and not ours.

Each program that a test starts would spend five seconds on PyTorch, SciPy,
Transformers, MMEngine and the like. One process imports them; a run is a fork
of it that imports mmdet, mmseg and this package by itself.
:func:`warm_python` gives a command that takes the arguments of ``python``:
``-c CODE``, ``-m MODULE`` or a script. (Programs on standard input are so short
that it leaves them to ``python``.)

What forks share real processes do not: the hash seed, and what the imported
libraries read from the environment; and they end without taking anything apart,
which would copy all that was imported: a fault at shutdown does not show. Tests
of these start a real Python, one of several processes among them.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SLOW = """
    torch torch.distributed.tensor torchvision cv2 scipy.optimize scipy.stats
    matplotlib.pyplot pycocotools.cocoeval rich.console rich.table
    transformers.modeling_utils timm.layers imgaug skimage shapely.geometry
    terminaltables prettytable mmengine.runner mmengine.infer
""".split()
OURS = {'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'convnext_mm'}
# It sets what Triton reads when it is imported, and PyTorch imports Triton.
NEEDS_A_FRESH_ONE = 'check_kernels.py'
SERVERS: list[subprocess.Popen] = []  # referred to, or their input would end


@functools.cache
def warm_python() -> str:
    """The command; its process ends with this one."""
    folder = Path(tempfile.mkdtemp(prefix='warm_python'))
    start = f'{sys.executable} -IS {__file__} {folder}/socket'
    command = folder / 'python'
    command.write_text(
        '#!/bin/sh\n'
        f'case "${{1:--}} $*" in "- "*|*{NEEDS_A_FRESH_ONE}*) '
        f'exec {sys.executable} "$@" ;; esac\n'
        f'exec {start} "$@"\n'
    )
    command.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f'{folder}/socket')
    listener.listen()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    environment.pop('PYTHONPATH', None)
    SERVERS.append(
        subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            env=environment,
            stdin=subprocess.PIPE,  # closed when this process is gone
            pass_fds=[listener.fileno()],
        )
    )
    return str(command)


def ask(path: str, arguments: list[str]) -> int:
    """A run, seen from outside; its exit status, negative for a signal's."""
    request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [len(request).to_bytes(8, 'big')], [0, 1, 2])
        server.sendall(request)
        return int.from_bytes(server.recv(8), 'big', signed=True)


def read_models() -> None:
    """The list that MMEngine reads for each ``mmdet::`` in a config."""
    import importlib.util

    from mmengine.config import utils

    from speed import quick_configs

    quick_configs()
    package = importlib.util.find_spec('mmdet')
    if package is not None:
        with contextlib.suppress(ValueError):  # no such config
            utils._get_cfg_metainfo(package.submodule_search_locations[0], '')


def serve(listener: socket.socket) -> None:
    """Forks for each run, until standard input ends. Comes back in the forks."""
    import gc
    import importlib
    import select

    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    read_models()
    assert not OURS & {name.split('.')[0] for name in sys.modules}
    gc.collect()
    gc.freeze()  # or each fork would copy it all to look for garbage
    children = set()
    while True:
        ready = select.select([sys.stdin, listener, *children], [], [])[0]
        if sys.stdin in ready:
            os._exit(0)
        for pidfd in children & {*ready}:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            os.close(pidfd)
            children.remove(pidfd)
        if listener not in ready:
            continue
        connection = listener.accept()[0]
        pid = os.fork()
        if pid == 0:
            listener.close()
            start(connection)
            return
        connection.close()
        children.add(os.pidfd_open(pid))


def start(connection: socket.socket) -> None:
    """In the fork: forks the run and waits for its end, or for that of who
    asked. Comes back in the run."""
    import random
    import select

    import numpy as np
    import torch

    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    with connection.makefile('rb') as file:
        arguments, folder, environment = json.loads(
            file.read(int.from_bytes(size, 'big'))
        )
    pid = os.fork()
    if pid:
        pidfd = os.pidfd_open(pid)
        if pidfd not in select.select([connection, pidfd], [], [])[0]:
            os.killpg(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status < 0:  # its workers would keep its output open
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        try:
            connection.sendall(status.to_bytes(8, 'big', signed=True))
        finally:
            os._exit(0)
    os.setsid()
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = arguments
    for seed in (random.seed, np.random.seed, torch.seed):
        seed()


def run(arguments: list[str]) -> None:
    """What Python does with its arguments; of its options those that tests
    give."""
    import runpy
    import types

    while arguments and arguments[0] in ('-u', '-W'):
        del arguments[: 1 + (arguments[0] == '-W')]
    kind = arguments[0]
    del sys.path[0]
    paths = [p for p in os.environ.get('PYTHONPATH', '').split(':') if p]
    folder = '' if kind.startswith('-') else os.path.dirname(os.path.abspath(kind))
    sys.path[:0] = [folder, *paths]
    if kind == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    elif kind == '-c':
        sys.argv = [kind, *arguments[2:]]
        sys.modules['__main__'] = types.ModuleType('__main__')
        exec(arguments[1], vars(sys.modules['__main__']))
    else:
        sys.argv = arguments
        try:
            runpy.run_path(kind, run_name='__main__')
        finally:  # before what the error says
            sys.stdout.flush()


def run_and_end(arguments: list[str]) -> None:
    """Prints and gives the status that Python would."""
    import atexit
    import threading

    status = 0
    try:
        run(arguments)
    except SystemExit as error:
        status = error.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])))
        run_and_end(sys.argv)
    else:
        status = ask(sys.argv[1], sys.argv[2:])
        if status < 0:
            os.kill(os.getpid(), -status)
        sys.exit(status)
