"""Seeing the model: a backbone, learning rates, runs, training data."""

from .backbone import (
    build_backbone,
    describe,
    draw_feature_maps,
    draw_receptive_fields,
    effective_receptive_fields,
    feature_maps,
    load_weights,
    receptive_fields_of,
)
from .learning_rate import draw_schedule, schedule_of
from .runs import draw_runs, read_run
from .samples import draw_samples, write_samples

__all__ = [
    'build_backbone',
    'describe',
    'draw_feature_maps',
    'draw_receptive_fields',
    'draw_runs',
    'draw_samples',
    'draw_schedule',
    'effective_receptive_fields',
    'feature_maps',
    'load_weights',
    'read_run',
    'receptive_fields_of',
    'schedule_of',
    'write_samples',
]
