"""Tries code in processes of its own: a library that is broken may not only raise,
but end the process or never come back."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

TIMEOUT = 120.0  # seconds: a first import of PyTorch from a network disk takes long
MARK = '<doctor>'
DRIVER = f"""
import json, os, sys
for name, code in json.loads(sys.argv[1]).items():
    # Libraries print, too, and not always whole lines.
    print('\\n{MARK}' + json.dumps([name]), flush=True)
    names = {{}}
    try:
        exec(code, names)
        result = [name, names.get('found'), '']
    except BaseException as error:
        lines = str(error).strip().splitlines() or ['without a word']
        result = [name, None, type(error).__name__ + ': ' + lines[-1].strip()]
    print('\\n{MARK}' + json.dumps(result), flush=True)
    if result[2]:  # what comes next does not start with what a failed import left
        break
os._exit(0)
"""


class Probe(NamedTuple):
    """What came of trying something: a value, or why there is none."""

    value: Any = None
    error: str = ''


def try_steps(
    steps: Mapping[str, str], need_first: bool = False, timeout: float = TIMEOUT
) -> dict[str, Probe]:
    """Runs pieces of code after each other in one process; where one fails, the rest
    in another.

    Args:
        steps: Code by name. What it calls ``found`` is the value; JSON can hold it.
        need_first: The others fail as the first one does.
        timeout: Seconds for all of them.
    """
    probes: dict[str, Probe] = {}
    end = time.monotonic() + timeout
    while rest := {name: code for name, code in steps.items() if name not in probes}:
        command = [sys.executable, '-W', 'ignore', '-c', DRIVER, json.dumps(rest)]
        out, fault, in_time = _run(command, end - time.monotonic(), timeout)
        running = next(iter(rest))
        for line in out.splitlines():
            if line.startswith(MARK):
                running, *result = json.loads(line.removeprefix(MARK))
                if result:
                    probes[running] = Probe(*result)
        for name in [running] if in_time else rest:
            probes.setdefault(name, Probe(error=fault))
        first = probes[next(iter(steps))]
        if need_first and first.error:
            return dict.fromkeys(steps, first)
    return probes


def try_program(*command: str) -> Probe:
    """What a program prints, or why it fails."""
    out, fault, _ = _run(list(command), TIMEOUT, TIMEOUT)
    return Probe(error=fault) if fault else Probe(out.strip())


def _run(command: list[str], left: float, timeout: float) -> tuple[str, str, bool]:
    """Output, the last line of what went wrong, and whether it ended in time."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            # Nothing in the working folder is taken for a library.
            cwd=tempfile.gettempdir(),
            timeout=max(left, 0.1),
        )
    except subprocess.TimeoutExpired as late:
        return _text(late.stdout), f'it did not end within {timeout:g} s', False
    except OSError as error:
        return '', str(error), True
    out, said = _text(done.stdout), _text(done.stderr) or _text(done.stdout)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return out, f'the process was ended by {name}', True
    lines = said.strip().splitlines() or [f'exit status {done.returncode}']
    return out, lines[-1].strip() if done.returncode else '', True


def _text(output: bytes | None) -> str:
    return (output or b'').decode(errors='replace')
