"""Hooks of MMEngine's runner."""

from .checkpoint_hook import CheckpointHook
from .gradient_check_hook import GradientCheckHook
from .non_finite_hook import NonFiniteHook
from .profile_hook import ProfileFinished, StepProfilerHook
from .stall_hook import StallHook

__all__ = [
    'CheckpointHook',
    'GradientCheckHook',
    'NonFiniteHook',
    'ProfileFinished',
    'StallHook',
    'StepProfilerHook',
]
