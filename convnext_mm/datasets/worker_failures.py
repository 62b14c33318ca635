"""What it means that a process which loads data died, or that memory ran out."""

import re
import shutil

SHARED_MEMORY = '/dev/shm'
FEWER_WORKERS = (
    'set train_dataloader.num_workers lower, persistent_workers=False for '
    'train_dataloader and val_dataloader (else the workers of both stay), or '
    'train_dataloader.batch_size lower'
)
# What a line of the message looks like, in the order of looking; what happened;
# what to try.
FAILURES = (
    (
        r'</?torch_\w+|unable to (open|mmap) shared memory|Bus error|out of shared mem',
        'shared memory, through which the workers hand over their batches, is full '
        '({space})',
        'start the container with --shm-size=8g or --ipc=host, or ' + FEWER_WORKERS,
    ),
    (
        r'out of memory|OutOfMemoryError|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED',
        'the device has no memory left',
        'set train_dataloader.batch_size lower, model.backbone.with_cp=True or '
        "model.backbone.impl='lean+' (both store less for backward), train in mixed "
        'precision (--amp), or on smaller images',
    ),
    (
        r'MemoryError|[Cc]annot allocate memory|DefaultCPUAllocator',
        'the machine has no memory left',
        FEWER_WORKERS + '; in training on a CPU model.backbone.with_cp=True or '
        "model.backbone.impl='lean+' stores less",
    ),
    (
        r'worker .*(killed by signal: Killed|exited unexpectedly)',
        'a process that loads data was killed, as Linux does when memory runs out '
        '(dmesg says so)',
        FEWER_WORKERS + ', or give the job more memory',
    ),
    (
        r'worker .*killed by signal',
        'a process that loads data crashed',
        'run with train_dataloader.num_workers=0 and persistent_workers=False, where '
        'the crash shows what was loaded',
    ),
    (
        r'Too many open files|received \d+ items of ancdata',
        'the limit of open files is reached',
        'raise it with `ulimit -n 65536`, or ' + FEWER_WORKERS,
    ),
    (
        r'No space left on device',
        'a disk is full, which `df -h` shows, or shared memory ({space})',
        'free some, name another --work-dir, or keep fewer checkpoints '
        '(default_hooks.checkpoint.max_keep_ckpts=1)',
    ),
)


def explain_runtime_failure(error: BaseException) -> str | None:
    """A sentence for a dead data worker, and for memory, shared memory, open
    files or disk space that ran out.

    Args:
        error: What a run ended with; its causes are looked at, too.

    Returns:
        What happened, the line of the message that says it, and what to try;
        None for every other error.
    """
    for cause in _causes(error):
        # The last lines first: a worker sends its traceback.
        lines = f'{type(cause).__name__}: {cause}'.splitlines()[::-1]
        for pattern, what, advice in FAILURES:
            line = next((line for line in lines if re.search(pattern, line)), None)
            if line is not None:
                happened = what.format(space=_space())
                return f'{happened}: {advice} ({line.strip()[:200]})'
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """What a traceback would show, of the kinds that the system raises; the first
    cause first, which says most."""
    shown: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in shown:
        shown.append(cause)
        hidden = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or hidden
    return [
        cause
        for cause in reversed(shown)
        if isinstance(cause, (RuntimeError, OSError, MemoryError))
    ]


def _space() -> str:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return f'no {SHARED_MEMORY}'
    return (
        f'{SHARED_MEMORY}: {usage.free >> 20} of {usage.total >> 20} MiB are free now'
    )
