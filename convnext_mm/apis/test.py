"""Evaluating a checkpoint with a config."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from convnext_mm.checkpoint import CheckpointError, check_source
from convnext_mm.checkpoint.load import load_pretrained, read_beside
from convnext_mm.datasets.data_paths import check_data
from convnext_mm.engine.errors import ConfigError
from convnext_mm.engine.launch import fit_to_device, running
from convnext_mm.models import ReleasedClassifierInit, StagedBackbone

from .config import load_config
from .config_check import check_config, check_paths
from .zoo import Model, find, resolve

# Of the metafiles, to those of the evaluators: name, what makes it percent, and
# whether it is over scales and flips.
OF_EVALUATORS = {
    'box AP': ('coco/bbox_mAP', 100, False),
    'mask AP': ('coco/segm_mAP', 100, False),
    'mIoU': ('mIoU', 1, False),
    'mIoU(ms)': ('mIoU', 1, True),
    'mIoU(ms+flip)': ('mIoU', 1, True),
    'Top 1 Accuracy': ('accuracy/top1', 1, False),
    'mCE': ('corruption/mCE', 1, False),
    'Mean Error': ('corruption/mean_error', 1, False),
}


def prepare(
    model: str,
    checkpoint: str | None = None,
    tta: bool = False,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    **options: Any,
) -> Config:
    """The config to test, checked and fitted to the machine.

    Args:
        model, checkpoint: Of :func:`convnext_mm.apis.zoo.resolve`.
        tta: Average over scales and flips, as ``tta_model`` and
            ``tta_pipeline`` of the config say.
        show: Show predictions in a window.
        show_dir: Write pictures of predictions here.
        wait_time: Seconds per shown image.
        **options: Of :func:`convnext_mm.apis.config.load_config`.

    Raises:
        ConfigError, CheckpointError, DataError: A path or setting is wrong;
            says which and what to do.
    """
    check_paths(model, checkpoint)
    config, checkpoint, _ = resolve(model, checkpoint)
    cfg = load_config(config, **options)
    check_source(checkpoint)
    cfg.load_from = checkpoint
    cfg.resume = False  # the config of a run that was resumed says True
    if show or show_dir:
        draw_predictions(cfg, show, show_dir, wait_time)
    if tta:
        use_test_time_augmentation(cfg, config)
    check_config(cfg, 'test')
    fit_to_device(cfg)
    check_data(cfg, ['test_dataloader'])
    return cfg


def test(
    model: str,
    checkpoint: str | None = None,
    out: str | None = None,
    deploy: bool = False,
    **options: Any,
) -> dict[str, float]:
    """Evaluates, and logs the metrics; those of a trained model of the zoo are
    printed beside what is published.

    Args:
        model, checkpoint: Of :func:`convnext_mm.apis.zoo.resolve`.
        out: Write the predictions here, as a pickle.
        deploy: Fold and pack the backbone for inference first.
        **options: Of :func:`prepare`.

    Returns:
        Metrics by the names that the evaluator gives them.

    Raises:
        ConfigError: A path or setting is wrong, ``out`` has another ending
            than .pkl or .pickle, or there is nothing to deploy.
        CheckpointError: The checkpoint cannot be used.
        DataError: The data is missing or bad.
    """
    if out and not out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out must end in .pkl or .pickle, got {out}')
    check_paths(model, checkpoint)
    look_for_data(model, checkpoint, options)
    config, checkpoint, known = resolve(model, checkpoint)
    cfg = prepare(config, checkpoint, **options)
    with running(cfg) as runner:
        load_released_classifier(runner, str(checkpoint))
        if out:
            if cfg.get('default_scope') == 'mmdet':  # keeps masks compressed
                from mmdet.evaluation import DumpDetResults as DumpResults
            else:
                from mmengine.evaluator import DumpResults
            runner.test_evaluator.metrics.append(DumpResults(out))
        if deploy:
            switch_to_deploy(runner)
        metrics = runner.test()
    if known is not None and is_main_process():
        compare(metrics, known, bool(options.get('tta')))
    return metrics


def look_for_data(
    model: str, checkpoint: str | None, options: Mapping[str, Any]
) -> None:
    """Before weights of hundreds of megabytes are fetched.

    Args:
        model, checkpoint: Of :func:`convnext_mm.apis.zoo.resolve`.
        options: Of :func:`prepare`.

    Raises:
        DataError: The data of a trained model's test is missing.
    """
    known = None if os.path.exists(model) or checkpoint else find(model)
    if known is not None and known.weights and known.cached is None:
        named = ('work_dir', 'cfg_options', 'data_root', 'launcher')
        loading = {name: options[name] for name in named if name in options}
        check_data(load_config(model, **loading), ['test_dataloader'])


def compare(metrics: dict[str, float], model: Model, tta: bool = False) -> None:
    """Prints measured figures beside published ones, in percent.

    Args:
        metrics: Of the evaluator.
        model: Whose they are.
        tta: They are over scales and flips.
    """
    data = model.metadata.get('Test Data', model.metadata['Training Data'])
    table = Table(title=f'{model.shortest}, published on {data}')
    for column in ('metric', 'measured', 'published', 'difference'):
        table.add_column(column, justify='left' if column == 'metric' else 'right')
    for name, published in model.metrics.items():
        key, unit, is_tta = OF_EVALUATORS.get(name.partition(' (')[0], ('', 1, tta))
        if key in metrics and is_tta == tta:
            measured = unit * metrics[key]
            difference = f'{measured - published:+.2f}'
            table.add_row(name, f'{measured:.2f}', f'{published:.2f}', difference)
    if table.row_count:
        Console().print(table)


def draw_predictions(
    cfg: Config, show: bool, show_dir: str | None, wait_time: float
) -> None:
    """Switches the config's visualization hook on."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ConfigError(
            '--show and --show-dir need default_hooks.visualization in the config'
        )
    # The hooks would put another folder below one of the work folder's.
    show_dir = show_dir and os.path.abspath(show_dir)
    scope = cfg.get('default_scope')
    switch = 'enable' if scope == 'mmpretrain' else 'draw'
    hook.update({switch: True}, show=show, wait_time=wait_time)
    if show_dir and scope == 'mmseg':
        cfg.visualizer.save_dir = show_dir
    elif show_dir:
        folder = 'out_dir' if scope == 'mmpretrain' else 'test_out_dir'
        hook[folder] = show_dir


def switch_to_deploy(runner: Runner) -> None:
    """Loads the checkpoint, then switches every backbone of this package.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        ConfigError: The model has none.
    """
    backbones = [m for m in runner.model.modules() if isinstance(m, StagedBackbone)]
    if not backbones:
        raise ConfigError('--deploy needs a model with a backbone of convnext_mm')
    runner.load_or_resume()
    for backbone in backbones:
        backbone.switch_to_deploy()


def load_released_classifier(runner: Runner, checkpoint: str) -> None:
    """Loads a classifier in the layout of the paper's release, which has no names of
    MMPretrain's; whatever else there is the runner loads.

    Raises:
        CheckpointError: It does not fit the model.
    """
    if runner.cfg.get('default_scope') != 'mmpretrain':
        return
    tensors = {}
    with contextlib.suppress(CheckpointError):  # the runner says why
        tensors = read_beside(checkpoint)
    model = getattr(runner.model, 'module', runner.model)
    backbone = getattr(model, 'backbone', None)
    if 'head.weight' in tensors and isinstance(backbone, StagedBackbone):
        load_pretrained(backbone, checkpoint)
        ReleasedClassifierInit(checkpoint)(model.head)
        runner._has_loaded = True


def use_test_time_augmentation(cfg: Config, name: str) -> None:
    """Puts the config's ``tta_model`` around its model and ``tta_pipeline``
    into its test set. What ``tta_model.module`` holds is merged into the model
    (the published multi-scale segmentation takes images whole).

    Raises:
        ConfigError: The config has no such settings.
    """
    missing = [key for key in ('tta_model', 'tta_pipeline') if not cfg.get(key)]
    if missing:
        raise ConfigError(
            f'--tta needs {" and ".join(missing)} in the config, which {name} '
            'does not have; configs/_base_/datasets/ade20k_512x512.py has an '
            'example for segmentation'
        )
    tta_model = cfg.tta_model
    cfg.merge_from_dict(dict(model=tta_model.pop('module', {})))
    cfg.model = dict(**tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # RepeatDataset and the like
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
