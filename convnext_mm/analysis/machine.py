"""Where and with what something was measured, for result files."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    'torch',
    'triton',
    'timm',
    'torchvision',
    'transformers',
    'numpy',
    'onedl-mmengine',
    'mmengine',
    'onedl-mmcv',
    'mmcv',
    'onedl-mmdetection',
    'mmdet',
    'onedl-mmsegmentation',
    'mmsegmentation',
    'onedl-mmpretrain',
    'mmpretrain',
    'onnx',
    'onnxruntime',
    'onnxscript',
)


def machine(device: str = 'cpu') -> dict:
    """Processor, cores, threads and load of this machine.

    Args:
        device: ``'cuda'`` adds GPU, memory, compute capability, CUDA and
            driver.
    """
    facts: dict[str, Any] = dict(
        cpu=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        load_average=os.getloadavg(),
        platform=platform.platform(),
        python=platform.python_version(),
        device=device,
    )
    if device == 'cuda':
        facts.update(
            gpu=torch.cuda.get_device_name(),
            gpu_memory_bytes=torch.cuda.mem_get_info()[1],
            capability=torch.cuda.get_device_capability(),
            cuda=torch.version.cuda,
            driver=_driver(),
        )
    return facts


def processor() -> str:
    """The model of the processor, as Linux names it."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (line.split(': ')[1] for line in lines if line.startswith('model name')),
        platform.processor(),
    )


def _driver() -> str:
    try:
        return (
            subprocess.run(
                ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
                capture_output=True,
                text=True,
                check=True,
            )
            .stdout.split('\n')[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on, as far as installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
