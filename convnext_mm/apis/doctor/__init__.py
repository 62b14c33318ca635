"""Examines the environment. It runs where PyTorch, MMEngine or OpenCV are missing or
broken: what imports them are processes of their own."""

from collections.abc import Callable, Iterator

from . import libraries, machine, pytorch
from .evidence import Evidence, gather
from .finding import Finding, Fix, not_examined

__all__ = ['Evidence', 'Finding', 'Fix', 'examine', 'gather']

Check = Callable[[Evidence], Iterator[Finding]]
GROUPS: dict[str, tuple[Check, ...]] = {
    'Python': (libraries.python, libraries.environment),
    'PyTorch': (pytorch.torch, pytorch.torchvision, pytorch.gpus),
    'OpenMMLab': (
        libraries.openmmlab,
        libraries.operators,
        libraries.tasks,
        libraries.transformers,
    ),
    'This package': (
        libraries.package,
        libraries.opencv,
        libraries.compiled,
        libraries.optional,
        pytorch.impl,
        machine.cache,
    ),
    'Machine': (machine.processor, machine.memory, machine.shared_memory, machine.disk),
    'Data': (machine.data,),
}


def examine(evidence: Evidence | None = None) -> dict[str, list[Finding]]:
    """Draws all findings, by group.

    Args:
        evidence: By default that of this Python, which takes seconds to gather.
    """
    evidence = evidence or gather()
    return {
        group: [finding for check in checks for finding in _all_of(check, evidence)]
        for group, checks in GROUPS.items()
    }


def _all_of(check: Check, evidence: Evidence) -> list[Finding]:
    try:
        return list(check(evidence))
    except Exception as error:  # an environment can be broken in any way
        reason = f'{type(error).__name__}: {error}'
        return [not_examined(check.__name__, reason)]
