"""Models as files that other programs run."""

import copy
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from convnext_mm.apis.config import load_config
from convnext_mm.apis.inference.predictor import Predictor
from convnext_mm.apis.quiet import quiet
from convnext_mm.apis.zoo import resolve
from convnext_mm.checkpoint.load import load_pretrained
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone

from .build import network_for
from .check import compare, inputs_of, pictures, speed
from .networks import Network
from .quantise import quantise
from .targets import EXAMPLE, OLDEST_OPSET, OPSET, TARGETS, need, write

DTYPES = dict(fp32=torch.float32, fp16=torch.float16)
PARTS = ('model', 'backbone')
# Share of the largest value, or pixels, that rounding explains; int8 is measured, not
# judged.
TOLERANCES = dict(fp32=1e-3, fp16=3e-2)
CALIBRATED = 100  # pictures at most that ranges are taken from
IMAGE_FILES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp'}


@dataclass
class Exported:
    """A file, and what was seen of it.

    Attributes:
        path: Of the file.
        to: The target.
        inputs: What it takes, in words.
        outputs: Names of what it gives.
        operators: And how many of each.
        bytes: Of the file, and of the one beside it with weights above 1.9 GB.
        differences: From the model, see :func:`.check.compare`; empty without check.
        time: Over that of the same network in PyTorch, deployed; None without check.
    """

    path: Path
    to: str
    inputs: str
    outputs: tuple[str, ...]
    operators: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    differences: dict[str, float] = field(default_factory=dict)
    time: float | None = None


def export(
    model: str | nn.Module,
    to: str = 'onnx',
    out: str | Path | None = None,
    *,
    checkpoint: str | None = None,
    part: str = 'model',
    dtype: str = 'fp32',
    int8: str | None = None,
    shape: tuple[int, int] | None = None,
    opset: int = OPSET,
    images: str | Sequence[str] = (),
    check: bool = True,
    cfg_options: dict | None = None,
) -> Exported:
    """Writes a model, folded, to a file that runs without this package.

    Whole models take images (N, 3, H, W) in fp32, red first, 0 to 255; a backbone
    takes what its preprocessor gives. A segmentor gives logits (N, classes, H, W) and
    classes (N, H, W); a detector takes one image and gives boxes (n, 4), scores (n,),
    labels (n,) and masks (n, 28, 28) of ``max_per_img`` objects, score 0 where there
    are fewer. A network of the caller's stays as it is. See docs/export.md.

    Args:
        model: What :func:`convnext_mm.infer` takes, or a network in evaluation mode.
        to: ``'onnx'``, ``'torch-export'`` or ``'torchscript'``.
        out: The file; by default in ``outputs/``, named after the model.
        checkpoint: Weights, where ``model`` is a config.
        part: ``'model'`` or ``'backbone'``.
        dtype: ``'fp32'`` or ``'fp16'``, of weights and maps.
        int8: Folder of pictures to find the ranges of activations with, a hundred
            of them at most: products become those of int8 (ONNX only).
        shape: Height and width, to fix them; else the file takes any.
        opset: Version of ONNX's operators.
        images: Pictures to compare on, or folders of them; drawn ones by default.
        check: Run the file in another process and compare it with the model.
        cfg_options: Settings of the config to override.

    Returns:
        What was written, and how it compares.

    Raises:
        ConfigError: A setting, size or part cannot be exported, a package is
            missing, or the file gives something else than the model.
        CheckpointError: The weights cannot be used.
    """
    _check_settings(to, part, dtype, int8, opset, shape)
    if to == 'onnx':
        need('onnx', 'onnxscript', *(('onnxruntime',) if check or int8 else ()))
    precision = 'int8' if int8 else dtype
    path = Path(out) if out else _default(model, part, precision, to)
    _check_path(path, to)
    compared = pictures(_files_of(images), shape)
    examples = pictures(_some_in(int8), shape) if int8 else []
    facts: dict[str, Any] = {}
    if isinstance(model, str):
        model, facts = _load(model, checkpoint, part, cfg_options)
    elif checkpoint is not None or cfg_options is not None:
        raise ConfigError(
            'checkpoint and cfg_options are for a model by its name: load the weights '
            'into the network before it is exported'
        )
    elif part == 'backbone' and not isinstance(model, StagedBackbone):
        model = getattr(model, 'backbone', model)
    network = network_for(copy.deepcopy(model), DTYPES[dtype])
    _check_size(shape, network)
    facts |= dict(
        inputs=_inputs(network, shape), outputs=network.outputs, dtype=precision
    )
    result = Exported(path, to, facts['inputs'], network.outputs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whatever goes wrong, an older file stays as it is.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder, path.name)
            result.operators = write(network, to, draft, shape, opset, facts)
            if int8:
                result.operators = _to_int8(draft, network, examples)
            if check:
                result.differences = compare(model, network, draft, compared)
                _judge(result, precision)
                if dtype == 'fp16':
                    network = network_for(copy.deepcopy(model))
                (x,) = inputs_of(network, pictures((), shape or EXAMPLE))
                result.time = speed(network, draft, x, to)
            for file in Path(folder).iterdir():  # also weights beside it
                result.bytes += file.stat().st_size
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise ConfigError(
            f'{path} cannot be written ({error.strerror or error}): name another --out'
        ) from error
    return result


def _check_settings(
    to: str,
    part: str,
    dtype: str,
    int8: str | None,
    opset: int,
    shape: tuple[int, int] | None,
) -> None:
    for name, value, known in (
        ('--to', to, TARGETS),
        ('--part', part, PARTS),
        ('--dtype', dtype, DTYPES),
    ):
        if value not in known:
            raise ConfigError(f'{name} {value}: one of {", ".join(known)}')
    if int8 and (to != 'onnx' or dtype != 'fp32'):
        raise ConfigError(
            f'--int8 is for --to onnx --dtype fp32, not for {to} in {dtype}'
        )
    if shape is not None and min(shape) < 1:
        raise ConfigError(
            f'--shape {shape[0]} {shape[1]}: give pixels, such as 512 512'
        )
    if to == 'onnx':
        need('onnx')
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not OLDEST_OPSET <= opset <= newest:
            raise ConfigError(
                f'--opset {opset}: PyTorch writes {OLDEST_OPSET} to {newest} '
                f'({OPSET} by default)'
            )


def _check_path(path: Path, to: str) -> None:
    if path.suffix != TARGETS[to]:
        raise ConfigError(f'{path} does not end in {TARGETS[to]}, as files of {to} do')
    if path.is_dir():
        raise ConfigError(f'{path} is a folder: name a file with --out')


def _check_size(shape: tuple[int, int] | None, network: Network) -> None:
    if shape is not None and min(shape) < network.min_size:
        raise ConfigError(
            f'--shape {shape[0]} {shape[1]}: the model takes '
            f'{network.min_size} x {network.min_size} pixels or more'
        )


def _inputs(network: Network, shape: tuple[int, int] | None) -> str:
    batch = 'N' if network.batch else '1'
    height, width = shape or ('H', 'W')
    kind = (
        'fp32, red first, 0 to 255'
        if hasattr(network, 'mean')
        else 'fp32, as the preprocessor normalises them'
    )
    return f'images ({batch}, {network.channels}, {height}, {width}) {kind}'


def _default(model: str | nn.Module, part: str, precision: str, to: str) -> Path:
    name = type(model).__name__
    if isinstance(model, str):
        name = Path(model).stem or Path(model).resolve().name
    ending = '-backbone' if part == 'backbone' else ''
    return Path('outputs', f'{name}{ending}-{precision}{TARGETS[to]}')


def _load(
    name: str, checkpoint: str | None, part: str, cfg_options: dict | None
) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its weights, and what whoever runs it has to know."""
    config, weights, _ = resolve(name, checkpoint)
    cfg = load_config(config, cfg_options=cfg_options)
    if part == 'backbone':
        return _backbone(cfg, config, weights), dict(preprocessor=_plain(cfg))
    predictor = Predictor(
        name, checkpoint, 'cpu', deploy=False, cfg_options=cfg_options
    )
    return predictor.inferencer.model, dict(
        predictor.dataset_meta,
        task='detection' if predictor.scope == 'mmdet' else 'segmentation',
        **_resizing(cfg),
    )


def _backbone(cfg: Config, config: str, weights: str) -> nn.Module:
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with quiet():
        backbone = MODELS.build(cfg.model.backbone)
    if not isinstance(backbone, StagedBackbone):
        raise ConfigError(
            f'the backbone of {config} is {type(backbone).__name__}, not one of this '
            'package'
        )
    load_pretrained(backbone, weights)
    return backbone.eval()


def _plain(cfg: Config) -> dict[str, Any]:
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor')
    return {
        key: preprocessor[key]
        for key in ('mean', 'std', 'bgr_to_rgb', 'to_rgb')
        if preprocessor and key in preprocessor
    }


def _resizing(cfg: Config) -> dict[str, Any]:
    """How the test pipeline scales a picture, and how a segmentor cuts it."""
    pipeline = cfg.test_dataloader.dataset.pipeline
    resize: Any = next((t for t in pipeline if t.type.split('.')[-1] == 'Resize'), {})
    test_cfg = cfg.model.get('test_cfg') or {}
    rcnn = test_cfg.get('rcnn') or {}
    facts = dict(
        scale=resize.get('scale'),
        keep_ratio=resize.get('keep_ratio', False),
        crop_size=test_cfg.get('crop_size'),
        stride=test_cfg.get('stride'),
        mask_threshold=rcnn.get('mask_thr_binary'),
    )
    return {key: value for key, value in facts.items() if value is not None}


def _to_int8(
    path: Path, network: Network, images: Sequence[np.ndarray]
) -> Counter[str]:
    import onnx

    with quiet():
        quantise(path, path, inputs_of(network, images))
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _files_of(images: str | Sequence[str]) -> list[str]:
    """Pictures, and those in folders."""
    found: list[str] = []
    for path in [images] if isinstance(images, str) else images:
        found += _pictures_in(path, '--images') if Path(path).is_dir() else [path]
    return found


def _some_in(folder: str) -> list[str]:
    files = _pictures_in(folder, '--int8')
    return files[:: -(-len(files) // CALIBRATED)]


def _pictures_in(folder: str, option: str) -> list[str]:
    """
    Raises:
        ConfigError: There are none.
    """
    files = [str(file) for file in Path(folder).rglob('*')]
    files = sorted(f for f in files if Path(f).suffix.lower() in IMAGE_FILES)
    if not files:
        raise ConfigError(
            f'{option} {folder}: '
            + ('it holds no pictures' if Path(folder).is_dir() else 'no such folder')
            + f'; give one with some ({", ".join(sorted(IMAGE_FILES))}), a hundred of '
            'what the model will see'
        )
    return files


def _judge(result: Exported, precision: str) -> None:
    differences = result.differences
    limit = TOLERANCES.get(precision)
    if limit is None:
        return
    far = {
        name: value
        for name, value in differences.items()
        if name in ('largest', 'scores') and not value <= limit
    }
    lost = differences.get('unmatched', 0) > 0.1 * differences.get('objects', 0)
    if far or (lost and precision == 'fp32'):
        raise ConfigError(
            f'what would be {result.path} differs from the model by more than rounding '
            f'explains: {differences}. Nothing was kept (--no-check keeps it); report '
            'it with the config'
        )
