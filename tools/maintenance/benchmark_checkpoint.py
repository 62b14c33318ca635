"""Measures reading and converting a checkpoint beside plain PyTorch.

Makes an xlarge model's files (timm names, 1.4 GB), then times, in turns and
each in a process of its own, torch.load plus torch.save of it, and
tools/convert_checkpoint.py of it; and the memory that reading, converting and
loading into a model take beyond the model. Writes benchmarks/checkpoint.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from convnext_mm.analysis.machine import machine, versions

ROOT = Path(__file__).resolve().parents[2]
PLAIN = """
import sys, time
import torch
start = time.perf_counter()
checkpoint = torch.load(sys.argv[1], map_location='cpu', weights_only=True)
torch.save(checkpoint, sys.argv[2])
print(time.perf_counter() - start)
"""
OURS = """
import sys, time
from pathlib import Path
import torch
from convnext_mm.apis.convert import convert_file
start = time.perf_counter()
convert_file(sys.argv[1], Path(sys.argv[2]))
print(time.perf_counter() - start)
"""
# VmHWM counts mapped pages of the file, too.
MEMORY = """
import logging, sys
from mmengine.logging import MMLogger
from convnext_mm import ConvNeXt
from convnext_mm.checkpoint.load import load_pretrained
def read(name):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status
                    if line.startswith(name)) * 1024
MMLogger.get_instance('benchmark', log_level='ERROR')
model = ConvNeXt(sys.argv[2])
before = read('VmRSS')
with open('/proc/self/clear_refs', 'w') as file:
    file.write('5')  # resets the peak
load_pretrained(model, sys.argv[1])
print(read('VmHWM') - before)
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--arch', default='xlarge')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'benchmarks' / 'checkpoint.json'
    )
    parser.add_argument('--folder', help='for temporary files (6 GB)')
    return parser.parse_args()


def make_file(arch: str, path: Path) -> None:
    """A checkpoint with timm's names and random weights."""
    from convnext_mm import ConvNeXt
    from convnext_mm.checkpoint.families import FAMILIES, layer_names

    timm = next(family for family in FAMILIES if family.name == 'timm')
    theirs = {ours: name for name, ours in layer_names(timm).items()}
    model = ConvNeXt(arch, out_norm=False)
    weights = {theirs[name]: tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, path)
    save_file(weights, path.with_suffix('.safetensors'))


def run(script: str, *args: str) -> float:
    output = subprocess.run(
        [sys.executable, '-c', script, *args],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    ).stdout
    return float(output.split()[-1])


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = str(Path(folder) / 'source.pth')
        target = str(Path(folder) / 'target.pth')
        make_file(args.arch, Path(source))
        size = os.path.getsize(source)
        seconds = dict(plain=[], convert=[])
        for _ in range(args.repeats):
            for name, script in (('plain', PLAIN), ('convert', OURS)):
                Path(target).unlink(missing_ok=True)
                os.sync()  # what was written before is no cost of this run
                seconds[name].append(run(script, source, target))
        memory = {
            suffix: run(MEMORY, source.replace('.pth', suffix), args.arch)
            for suffix in ('.pth', '.safetensors')
        }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = dict(
        command='python '
        + ' '.join(['tools/maintenance/benchmark_checkpoint.py', *sys.argv[1:]]),
        machine=machine(),
        versions=versions(),
        arch=args.arch,
        file_bytes=size,
        seconds=seconds,
        ratio_of_medians=medians['convert'] / medians['plain'],
        peak_memory_beyond_model_bytes=memory,
        memory_over_file={suffix: peak / size for suffix, peak in memory.items()},
    )
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + '\n')
    print(
        f'{size / 1e9:.2f} GB: torch.load + torch.save '
        f'{medians["plain"]:.2f} s, convert {medians["convert"]:.2f} s, '
        f'ratio {result["ratio_of_medians"]:.2f}; memory beyond the model '
        f'{max(memory.values()) / size:.2f} x the file'
    )


if __name__ == '__main__':
    main()
