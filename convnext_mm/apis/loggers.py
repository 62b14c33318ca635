"""Where else a run logs: TensorBoard, CSV, Weights & Biases, MLflow."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from mmengine.config import Config

from convnext_mm.engine.errors import ConfigError


class _Logger(NamedTuple):
    backend: str
    package: str | None  # that it needs beside ours


LOGGERS = {
    'tensorboard': _Logger('TensorboardVisBackend', 'tensorboard'),
    'csv': _Logger('convnext_mm.CSVVisBackend', None),
    'wandb': _Logger('WandbVisBackend', 'wandb'),
    'mlflow': _Logger('MLflowVisBackend', 'mlflow'),
}


def add_loggers(cfg: Config, names: Sequence[str]) -> None:
    """Adds backends to the visualizer of a config, in place; what it has stays.

    In a config one line does the same::

        visualizer = dict(vis_backends=[
            dict(type='LocalVisBackend'), dict(type='convnext_mm.CSVVisBackend')])

    Args:
        cfg: The whole config, with a visualizer or without.
        names: Keys of :data:`LOGGERS`. One that is there already is not added again.

    Raises:
        ConfigError: A name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(
                f'logger {name!r} is unknown: one of {", ".join(LOGGERS)}'
            )
        package = LOGGERS[name].package
        if package and find_spec(package) is None:
            raise ConfigError(
                f'logger {name!r} needs {package}, which is not installed: '
                f'`pip install {package}`'
            )
    if not names:
        return
    if not cfg.get('visualizer'):
        # What MMEngine builds where a config has none.
        cfg.visualizer = dict(
            type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
        )
    given: Any = cfg.visualizer.get('vis_backends') or []
    backends = [given] if isinstance(given, dict) else [*given]
    present = {_bare(backend.get('type')) for backend in backends}
    for name in dict.fromkeys(names):
        backend = LOGGERS[name].backend
        if _bare(backend) not in present:
            backends.append(dict(type=backend))
    cfg.visualizer.vis_backends = backends


def _bare(kind: Any) -> str:
    """The name of a type as a config gives it, without its scope."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]
