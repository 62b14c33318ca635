"""Hooks of MMEngine's runner."""

from .profile_hook import ProfileFinished, StepProfilerHook

__all__ = ['ProfileFinished', 'StepProfilerHook']
