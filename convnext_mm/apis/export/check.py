"""Whether an exported file gives what the model gave, and how fast."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from convnext_mm.analysis.meter import Meter, Step
from convnext_mm.apis.quiet import quiet
from convnext_mm.datasets.shapes import draw_scene
from convnext_mm.engine.errors import ConfigError
from convnext_mm.models import StagedBackbone

from . import run_file
from .networks import Network

# Of pictures: sides that 32 divides, and sides that nothing divides.
SHAPES = (256, 320), (224, 224), (333, 237)
SAME_BOX = 0.02  # corners at most so far apart, of the image's longer side
ROUNDS = 15


def pictures(
    files: Sequence[str], shape: tuple[int, int] | None, scale: int | None = None
) -> list[np.ndarray]:
    """Some to compare on, (H, W, 3) uint8, blue first.

    Args:
        files: Of the user; drawn shapes where there are none.
        shape: The one height and width that the file takes.
        scale: Side that files larger than it are shrunk to.

    Raises:
        ConfigError: A file is no picture.
    """
    if not files:
        rng = np.random.default_rng(0)
        found = []
        for height, width in [shape] if shape else SHAPES:
            image = draw_scene(rng, max(height, width)).image
            found.append(np.ascontiguousarray(image[:height, :width]))
        return found
    return [_read(file, shape, scale) for file in files]


def _read(file: str, shape: tuple[int, int] | None, scale: int | None) -> np.ndarray:
    if not Path(file).is_file():
        raise ConfigError(f'there is no picture {file}')
    image = cv2.imread(file)
    if image is None:
        raise ConfigError(f'{file} is no picture that can be read (JPEG, PNG, ...)')
    if shape:
        return cv2.resize(image, shape[::-1])
    factor = min(1.0, (scale or 800) / max(image.shape[:2]))
    return cv2.resize(image, None, fx=factor, fy=factor)


def inputs_of(network: Network, images: Sequence[np.ndarray]) -> list[Tensor]:
    """What a network takes: two of each picture, where it takes several at once; the
    second is mirrored."""
    found = []
    for image in images:
        x = torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)[None].float()
        if network.batch:
            x = torch.cat((x, x.flip(3)))
        if not hasattr(network, 'mean'):  # a backbone takes what is normalised
            x = (x - 127.5) / 58
            channels = network.channels
            x = x.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
        found.append(x)
    return found


def run_elsewhere(path: Path, inputs: Sequence[Tensor]) -> list[list[np.ndarray]]:
    """What a file gives in a process of its own, in which this package cannot be
    imported.

    Raises:
        RuntimeError: It does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder, 'images.npz'), Path(folder, 'outputs.npz')
        arrays: dict[str, Any] = {str(i): x.numpy() for i, x in enumerate(inputs)}
        np.savez(given, **arrays)
        done = subprocess.run(
            [sys.executable, '-I', run_file.__file__, path, given, got],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                f'{path} was written and does not run: '
                + (done.stderr.strip().splitlines() or ['no message'])[-1]
            )
        found: list[list[np.ndarray]] = [[] for _ in inputs]
        with np.load(got) as outputs:
            for key in outputs.files:
                found[int(key.split('.')[0])].append(outputs[key])
    return found


def compare(
    model: nn.Module, network: Network, path: Path, images: Sequence[np.ndarray]
) -> dict[str, float]:
    """Largest differences between a file, run elsewhere, and the model as
    MMDetection, MMSegmentation or a training run it: not folded, its own
    preprocessing and post-processing.

    Args:
        model: In evaluation mode, as it was given.
        network: What was exported of it.
        path: Of the file.
        images: (H, W, 3) uint8, blue first.

    Returns:
        Name of a difference to its value. Of maps and logits: ``largest`` as a share
        of the largest value; of a segmentor ``classes``: share of pixels whose class
        differs; of a detector: ``objects`` compared, ``unmatched`` ones (none with the
        same label there), ``boxes`` in pixels, ``scores``, ``masks`` as a share of
        their pixels.
    """
    inputs = inputs_of(network, images)
    results = run_elsewhere(path, inputs)
    if isinstance(model, StagedBackbone):
        check: Callable[..., dict[str, float]] = _compare_maps
    elif hasattr(model, 'decode_head'):
        check = _compare_logits
    else:
        check = _compare_objects
    total: dict[str, float] = {}
    with torch.no_grad(), quiet():
        for x, image, outputs in zip(inputs, images, results):
            tensors = [torch.from_numpy(output) for output in outputs]
            for name, value in check(model, x, image, tensors).items():
                before = total.get(name, 0.0)
                is_count = name in ('objects', 'unmatched')
                total[name] = before + value if is_count else max(before, value)
    return total


def _share(value: Tensor, true: Tensor) -> float:
    return float((value - true).abs().max() / true.abs().max())


def _compare_maps(
    model: Any, x: Tensor, image: np.ndarray, outputs: list[Tensor]
) -> dict[str, float]:
    return dict(largest=max(_share(a, b) for a, b in zip(outputs, model(x))))


def _compare_logits(
    model: Any, x: Tensor, image: np.ndarray, outputs: list[Tensor]
) -> dict[str, float]:
    from mmseg.structures import SegDataSample

    logits, classes = outputs
    blue_first = [picture.flip(0).byte() for picture in x]
    size = x.shape[2:]
    samples = [SegDataSample() for _ in x]
    inputs = model.data_preprocessor(dict(inputs=blue_first, data_samples=samples))
    padded = inputs['inputs'].shape[2:]
    meta = dict(ori_shape=size, img_shape=padded, pad_shape=padded)
    true = model.whole_inference(inputs['inputs'], [meta] * len(x))
    true = true[:, :, : size[0], : size[1]]
    best = true.argmax(1) if true.shape[1] > 1 else classes
    return dict(
        largest=_share(logits, true), classes=float((classes != best).float().mean())
    )


def _compare_objects(
    model: Any, x: Tensor, image: np.ndarray, outputs: list[Tensor]
) -> dict[str, float]:
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    from mmdet.structures import DetDataSample

    shape = image.shape[:2]
    sample = DetDataSample(
        metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
    )
    picture = torch.from_numpy(image).permute(2, 0, 1)
    (sample,) = model.test_step(dict(inputs=[picture], data_samples=[sample]))
    true = sample.pred_instances
    boxes, scores, labels = (value[outputs[1] > 0] for value in outputs[:3])
    found = dict(objects=float(len(true)), unmatched=float(abs(len(boxes) - len(true))))
    if not len(boxes) or not len(true):
        return found
    # Of those that lie there with the same label, the one with the closest score.
    near = torch.cdist(true.bboxes, boxes, torch.inf) <= SAME_BOX * max(shape)
    gap = (true.scores[:, None] - scores).abs()
    gap[~near | (true.labels[:, None] != labels)] = torch.inf
    least, index = gap.min(1)
    is_found = least.isfinite()
    found['unmatched'] = max(found['unmatched'], float((~is_found).sum()))
    if not is_found.any():
        return found
    index, true = index[is_found], true[is_found]
    found['boxes'] = float((boxes[index] - true.bboxes).abs().max())
    found['scores'] = float((scores[index] - true.scores).abs().max())
    if len(outputs) > 3:
        masks, _ = _do_paste_mask(
            outputs[3][index][:, None], boxes[index], *shape, skip_empty=False
        )
        masks = masks >= model.roi_head.test_cfg.mask_thr_binary
        differ = (masks ^ true.masks).sum((1, 2))
        found['masks'] = float((differ / true.masks.sum((1, 2)).clamp(min=1)).max())
    return found


def speed(network: Network, path: Path, x: Tensor, to: str) -> float:
    """Time of the file over that of the same network in PyTorch, deployed by this
    package; one process, in turns, median. Both use PyTorch's number of threads."""
    if to == 'onnx':
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            path, options, providers=['CPUExecutionProvider']
        )
        array = x.numpy()

        def run() -> object:
            return session.run(None, {'images': array})
    else:
        load = torch.jit.load if to == 'torchscript' else torch.export.load
        module = load(path)
        module = module if to == 'torchscript' else module.module()

        def run() -> object:
            return module(x)

    with torch.no_grad(), quiet():
        times = Meter('cpu').times(
            dict(file=Step(run), torch=Step(lambda: network(x))), ROUNDS, warmup=3
        )
    return times['file']['median_ms'] / times['torch']['median_ms']
