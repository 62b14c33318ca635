"""Runs an exported file where this package, and for ONNX PyTorch too, cannot be
imported: ``python -I run_file.py FILE IMAGES.npz OUTPUTS.npz``."""

import sys
from collections.abc import Callable
from typing import Any

ABSENT = ('convnext_mm', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


def main(path: str, images: str, outputs: str) -> None:
    is_onnx = path.endswith('.onnx')
    for name in (*ABSENT, *(('torch', 'torchvision') if is_onnx else ())):
        sys.modules[name] = None  # type: ignore[assignment]
    import numpy as np

    found = {}
    with np.load(images) as arrays:
        run = _onnx(path) if is_onnx else _torch(path)
        for key in arrays.files:
            for index, value in enumerate(run(arrays[key])):
                found[f'{key}.{index}'] = value
    np.savez(outputs, **found)


def _onnx(path: str) -> Callable[[Any], list]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return lambda images: session.run(None, {'images': images})


def _torch(path: str) -> Callable[[Any], list]:
    import torch
    import torchvision  # noqa: F401, its operators

    if path.endswith('.pt2'):
        module = torch.export.load(path).module()
    else:
        module = torch.jit.load(path)  # type: ignore[no-untyped-call]

    def run(images: Any) -> list:
        with torch.no_grad():
            found = module(torch.from_numpy(images))
        return [value.numpy() for value in found]

    return run


if __name__ == '__main__':
    main(*sys.argv[1:])
