"""What commands share: the config they name, and errors as one sentence."""

import contextlib
import logging
import os
import os.path as osp
import shutil
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger

from convnext_mm.checkpoint import CheckpointError
from convnext_mm.checkpoint.errors import shown
from convnext_mm.datasets.errors import DataError
from convnext_mm.datasets.worker_failures import explain_runtime_failure
from convnext_mm.engine import supervision
from convnext_mm.engine.agreement import Interrupted
from convnext_mm.engine.errors import ConfigError, TrainingError, last_lines

from .config_check import follow_backbone
from .quiet import quiet
from .zoo import find_config

NEED_OPERATORS = ('mmdet', 'mmseg')  # scopes of configs


def load_config(
    config: str,
    work_dir: str | None = None,
    cfg_options: dict | None = None,
    data_root: str | None = None,
    launcher: str = 'none',
) -> Config:
    """A config with overrides and the work folder set.

    Args:
        config: Path of the config, or name of a recipe.
        work_dir: Folder for logs, checkpoints and metrics; by default the
            config's, or ``work_dirs/CONFIG_NAME``.
        cfg_options: Settings to override, dotted names to values.
        data_root: Where the data is, instead of the config's ``data_root``.
        launcher: Job launcher: none, pytorch, slurm or mpi.

    Raises:
        ConfigError: There is no such config (close names are given),
            ``data_root`` is given and the config has none, or the config is for a
            library that needs mmcv's operators, and those do not import.
    """
    path = find_config(config)
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'{config} builds on a library that is not installed ({error}): see '
            'docs/recipes.md'
        ) from error
    if os.path.isdir(config):  # what its last start was asked for is not asked again
        cfg.resume = cfg.overwrite = False
    if cfg.get('default_scope') in NEED_OPERATORS:
        check_operators()
        _import_quietly(cfg.default_scope)
    cfg.launcher = launcher
    if cfg_options is not None:
        try:
            cfg.merge_from_dict(cfg_options)
        except (TypeError, KeyError, IndexError) as error:
            raise ConfigError(f'cfg_options: {shown(error.args[0], 300)}') from error
        given = {name for name in cfg_options if name.startswith('model.')}
        if any(name.startswith('model.backbone.') for name in given):
            follow_backbone(cfg)
            # What an option says of necks and heads, it says.
            cfg.merge_from_dict({name: cfg_options[name] for name in given})
    if data_root is not None:
        if not cfg.get('data_root'):
            raise ConfigError(
                f'--data-root replaces the data_root of a config;'
                f' {config} has none at its top level'
            )
        _replace_prefix(cfg._cfg_dict, cfg.data_root, osp.join(data_root, ''))
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', path.stem)
    return cfg


def program() -> str:
    """How a user calls the command line of this environment."""
    if shutil.which('convnext-mm'):
        return 'convnext-mm'
    return os.path.relpath(Path(sys.executable).with_name('convnext-mm'))


def check_operators() -> None:
    """MMEngine would go on without a library that does not import, and then say
    that it does not know the model's type.

    Raises:
        ConfigError: mmcv's operators do not import.
    """
    try:
        import mmcv.ops  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"mmcv's operators do not import ({error}): `{sys.executable} -m "
            'convnext_mm.compat.mmcv_ops` brings some that need no compiler'
        ) from error


def _import_quietly(library: str) -> None:
    """The libraries print what they do not find, and do without it. What does not
    import at all MMEngine says where it is needed."""
    with quiet(), contextlib.suppress(Exception):
        for room in ('datasets', 'models', 'evaluation'):
            import_module(f'{library}.{room}')


def _replace_prefix(node: Any, old: str, new: str) -> Any:
    """``node`` with the folder ``new`` (ends in a slash) for ``old`` in every
    path below; dicts and lists are changed in place."""
    if isinstance(node, str):
        is_below = node == old or node.startswith(osp.join(old, ''))
        return new + node[len(old) :].lstrip('/') if is_below else node
    if isinstance(node, tuple):
        return tuple(_replace_prefix(item, old, new) for item in node)
    if isinstance(node, (dict, list)):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            node[key] = _replace_prefix(node[key], old, new)
    return node


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """The door of every program: whatever goes wrong in it ends with one sentence,
    and a line with the place where it is explained.
    The traceback of what is nobody's fault but the program's is in the log, or,
    before there is one, printed."""
    supervision.announce()
    try:
        yield
    except (CheckpointError, ConfigError, DataError, TrainingError) as error:
        supervision.report(str(error), mendable=False)
        raise SystemExit(last_lines(error)) from None
    except Interrupted as stop:
        print(stop.message, file=sys.stderr)
        if stop.alone:
            sys.stderr.flush()
            os._exit(stop.code)
        raise
    except Exception as error:
        sentence = explain_runtime_failure(error) or (
            f'{type(error).__name__}: {shown(error, 500)}'
        )
        place = _log_traceback()
        supervision.report(sentence, supervision.is_mendable(error))
        raise SystemExit(last_lines(error, f'{sentence}{place}')) from None


def _log_traceback() -> str:
    """Writes the traceback of the current error into the log of the run."""
    text = traceback.format_exc()
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                record = logger.makeRecord(
                    logger.name, logging.ERROR, __file__, 0, text, (), None
                )
                handler.emit(record)
                return f' (the traceback is in {handler.baseFilename})'
    print(text, file=sys.stderr)
    return ''
