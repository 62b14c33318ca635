"""Gathers what findings are drawn from."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from itertools import takewhile
from pathlib import Path

from .probe import Probe, try_program, try_steps

PACKAGE = Path(__file__).resolve().parents[2]
OPERATORS_SCRIPT = PACKAGE / 'compat' / 'mmcv_ops' / '__main__.py'
# Import name of what a task needs to the distributions that have it, the maintained
# one first.
OPENMMLAB = {
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-full', 'mmcv-lite'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}
HEADS = ('mmdet', 'mmseg', 'mmpretrain')
# Of requirements that are not imported by their own name.
IMPORT_NAMES = {'pillow': 'PIL', 'pyyaml': 'yaml'}
# What has compiled parts, and where they are.
COMPILED = {'pycocotools': 'pycocotools.mask', 'scipy': 'scipy.optimize'}

GPUS = """
import torch
found = dict(cuda=torch.version.cuda, hip=torch.version.hip, fault='', gpus=[])
if torch.version.cuda or torch.version.hip:
    try:
        torch.cuda.init()
    except Exception as error:
        found['fault'] = str(error).strip().splitlines()[0]
    found['archs'] = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        gpu, fault = torch.cuda.get_device_properties(i), ''
        try:
            assert (torch.ones(8, device=i) + 1).sum().item() == 16
        except Exception as error:
            fault = str(error).strip().splitlines()[0]
        found['gpus'].append(
            [gpu.name, [gpu.major, gpu.minor], gpu.total_memory, fault]
        )
"""
VISION = """
import torch, torchvision
boxes = torch.tensor([[0., 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
keep = torchvision.ops.nms(boxes, torch.tensor([3., 2, 1]), 0.5)
assert keep.tolist() == [0, 2]
"""
# As a command of this package, which imports nothing unasked: what is picked shows
# also where another part of the package does not import.
IMPL = f"""
import sys
sys.argv[0] = 'convnext-mm'
sys.path.append({str(PACKAGE.parent)!r})
import torch
from convnext_mm import private_names
from convnext_mm.models import block
from convnext_mm.ops import triton
found = []
for device in ['cpu', *(f'cuda:{{i}}' for i in range(torch.cuda.device_count()))]:
    said = []
    block.print_log = triton.print_log = private_names.print_log = (
        lambda text, *_: said.append(text)
    )
    for dtype in (torch.float32, torch.bfloat16):
        try:
            x = torch.zeros(1, 96, 8, 8, dtype=dtype, device=device)
            chosen = block.select_impl('auto', x)
            name = next(k for k, v in block.IMPLEMENTATIONS.items() if v is chosen)
            why = triton.why_not(x) if device != 'cpu' else None
            why = why or ' '.join(text for text in said if ' blocks on ' not in text)
        except Exception as error:
            name, why = None, str(error)
        found.append([device, str(dtype).removeprefix('torch.'), name, why])
"""
WHOLE_PACKAGE = f"""
import sys
sys.path.append({str(PACKAGE.parent)!r})
import convnext_mm.public
"""


@dataclass
class Evidence:
    """Facts of an environment; by default those of this process."""

    versions: Mapping[str, str]
    """Of the installed distributions, by normalized name."""
    requires: Callable[[str], Iterable[str] | None]
    """The requirements of a distribution, as :func:`importlib.metadata.requires`."""
    probes: Mapping[str, Probe]
    """What came of trying, by the names that :func:`gather` gives."""
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    folder: Path = field(default_factory=Path.cwd)
    """The working folder."""
    python: tuple[int, ...] = tuple(sys.version_info[:3])
    prefixes: tuple[str, str] = (sys.prefix, sys.base_prefix)

    def installed(self, names: Iterable[str]) -> list[str]:
        """Those of some distributions that are there."""
        return [name for name in names if name in self.versions]

    def named(self, names: Iterable[str]) -> str:
        """Distributions with their versions."""
        return ', '.join(f'{name} {self.versions[name]}' for name in names)

    def obstacle(self) -> str:
        """What has to be mended before anything else can be told; or nothing."""
        if self.probes['torch'].error:
            return 'torch does not import'
        if not self.installed(OPENMMLAB['mmengine']):
            return 'there is no mmengine'
        return 'OpenCV does not import' if self.probes['cv2'].error else ''


def gather() -> Evidence:
    """Examines the environment of this Python, in several processes at once.

    ``probes`` holds ``torch`` (its version), ``torchvision``, ``gpus``, ``impl``,
    ``convnext_mm``, ``cv2``, each requirement, each head library, the compiled parts
    of others, and ``nvidia-smi`` and ``operators`` as they print.
    """
    versions = {
        normalized(distribution.name): distribution.version
        # Of two with one name the first is the one that is imported.
        for distribution in reversed(list(metadata.distributions()))
        if distribution.name
    }
    evidence = Evidence(versions, requirements, {})
    heads = [name for name in HEADS if evidence.installed(OPENMMLAB[name])]
    small = [name for name, _ in own_requirements(evidence) if name != 'torch']
    with_torch = {
        'torch': 'import torch; found = str(torch.__version__)',
        'gpus': GPUS,
        'torchvision': VISION,
        'impl': IMPL,
        'convnext_mm': WHOLE_PACKAGE,
        **{name: f'import {name}.models' for name in heads},
    }
    others = {
        'cv2': 'import cv2; found = cv2.__version__',
        **{
            name: f'import {IMPORT_NAMES.get(name, name.replace("-", "_"))}'
            for name in small
        },
        **{
            name: f'import {module}'
            for name, module in COMPILED.items()
            if name in versions
        },
    }
    status = (sys.executable, '-W', 'ignore', str(OPERATORS_SCRIPT), '--status')
    programs: dict[str, tuple[str, ...]] = {'operators': status}
    if smi := shutil.which('nvidia-smi'):
        query = '--query-gpu=name,driver_version', '--format=csv,noheader'
        programs['nvidia-smi'] = (smi, *query)
    with ThreadPoolExecutor() as pool:
        tried = pool.submit(try_steps, with_torch, True)
        tried_others = pool.submit(try_steps, others)
        printed = pool.map(lambda command: try_program(*command), programs.values())
        evidence.probes = {
            **tried.result(),
            **tried_others.result(),
            **dict(zip(programs, printed)),
        }
    return evidence


def requirements(name: str) -> list[str] | None:
    """As :func:`importlib.metadata.requires`; None where it is not installed."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None


def own_requirements(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Name and allowed versions of what this package needs in any case."""
    for requirement in evidence.requires('convnext-mm') or ():
        match = re.match(r'([\w.-]+)[^;<>=!~]*([^;]*)', requirement)
        if match and ';' not in requirement:
            yield normalized(match[1]), match[2].strip(' ()')


def normalized(name: str) -> str:
    """A distribution's name as indexes write it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare; what follows them counts for nothing."""
    parts = [re.match(r'\d+', part) for part in version.split('+')[0].split('.')]
    numbers = [int(part[0]) for part in takewhile(bool, parts) if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def allows(specifier: str, version: str) -> bool:
    """Whether ``>=2.4,<3`` and the like allow a version."""
    found = release(version)
    compare: dict[str, Callable[[tuple[int, ...]], bool]] = {
        '==': lambda wanted: found == wanted,
        '!=': lambda wanted: found != wanted,
        '>=': lambda wanted: found >= wanted,
        '<=': lambda wanted: found <= wanted,
        '>': lambda wanted: found > wanted,
        '<': lambda wanted: found < wanted,
    }
    return all(
        compare[operator](release(wanted))
        for operator, wanted in re.findall(r'(==|!=|>=|<=|>|<)\s*([\w.]+)', specifier)
    )
