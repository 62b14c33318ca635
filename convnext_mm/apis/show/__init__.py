"""Seeing the model: a backbone, learning rates, runs, training data, the road to
it."""

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
from .roadmap import RoadmapSettings, as_dict, conditions, walk
from .roadmap_picture import draw_roadmap
from .runs import draw_runs, read_run
from .samples import draw_samples, write_samples

__all__ = [
    'RoadmapSettings',
    'as_dict',
    'build_backbone',
    'conditions',
    'describe',
    'draw_feature_maps',
    'draw_receptive_fields',
    'draw_roadmap',
    'draw_runs',
    'draw_samples',
    'draw_schedule',
    'effective_receptive_fields',
    'feature_maps',
    'load_weights',
    'read_run',
    'receptive_fields_of',
    'schedule_of',
    'walk',
    'write_samples',
]
