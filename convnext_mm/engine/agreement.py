"""What one process learns and all must act upon in the same step: that it is time
to save, or that a scheduler wants the machine back."""

import mmap
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .network import choose_interface

# What schedulers send before they take a machine, and a user's Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same again would go on
WORKER_GRACE = 60  # seconds for data workers, in which the last steps are made


class Agreement:
    """The largest of what the processes say, one step late: nobody waits.

    On GPUs it goes through a group of its own on the CPU.

    Args:
        size: How many numbers are spoken of.
    """

    def __init__(self, size: int) -> None:
        self._group: Any = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._nothing = [0] * size
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        if self._distributed:
            choose_interface()
            self._group = dist.new_group(backend='gloo')

    def exchange(self, own: list[int]) -> list[int]:
        """Every process calls it in every step.

        Returns:
            The largest of what the processes said one step ago; alone, ``own``.
        """
        if not self._distributed:
            return own
        agreed = self.finish()
        tensor = torch.tensor(own)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group, async_op=True)
        self._pending = tensor, work
        return agreed

    def finish(self) -> list[int]:
        """Waits for what is under way, and gives what was agreed."""
        if self._pending is None:
            return self._nothing
        tensor, work = self._pending
        self._pending = None
        work.wait()
        return tensor.tolist()

    def wait_for_all(self) -> None:
        """Until every process is here."""
        self.finish()
        if self._distributed:
            dist.barrier(self._group)


class StopSignals:
    """Remembers a signal to stop until the step's end. A second Ctrl-C is
    Python's own, which ends at once.

    A terminal and some schedulers signal the processes that load data as well,
    which must serve the last steps. They inherit the handlers, and tell by memory
    that they share with their parent whether it is being stopped, or ends them.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._shared = mmap.mmap(-1, 1)
        self._before: dict[int, Any] = {}
        # Elsewhere Python takes no handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self) for n in SIGNALS}
            ServesLastSteps.signals = self

    @property
    def received(self) -> int:
        """The signal; 0 without any."""
        return self._shared[0]

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            if number == signal.SIGTERM:
                self._end_unless_stopping()
        elif number == signal.SIGINT and self.received:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        else:
            self._shared[0] = number

    def _end_unless_stopping(self, *_: Any) -> None:
        asked_before = signal.signal(signal.SIGALRM, self._end_unless_stopping)
        if asked_before == self._end_unless_stopping and not self.received:
            os._exit(128 + signal.SIGTERM)
        signal.alarm(WORKER_GRACE if self.received else 1)

    def restore(self) -> None:
        """Puts the handlers of before back."""
        ServesLastSteps.signals = None
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class ServesLastSteps:
    """A data loader's ``worker_init_fn`` that has a worker listen to signals as its
    parent does, whichever handlers PyTorch gave it.

    Args:
        init_fn: What to call besides.
    """

    signals: StopSignals | None = None  # of the parent, which forks

    def __init__(self, init_fn: Callable[[int], None] | None) -> None:
        self.init_fn = init_fn

    def __call__(self, worker_id: int) -> None:
        for number in SIGNALS if self.signals else ():
            signal.signal(number, self.signals)
        if self.init_fn is not None:
            self.init_fn(worker_id)


class Interrupted(SystemExit):
    """A run saved its state and ends because it was told to.

    Args:
        message: What was saved and how to go on.
        alone: The other processes may wait for this one in a collective, so that
            only the launcher can end them; to part with them in order would hang.
    """

    code: int

    def __init__(self, message: str, alone: bool = False) -> None:
        super().__init__(REQUEUE)
        self.message, self.alone = message, alone
