"""Tries what this package, mmpretrain and timm do with a ConvNeXt: one row of the
README's table for each question, answered by running it. Prints what it found;
with --write keeps that in benchmarks/comparison.json, and the table in README.md
between its marks. ROW names what to try; by default everything."""

import argparse
import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from make_benchmark_tables import AVX2, SAVED, TRAIN, Result, markdown

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / 'benchmarks' / 'comparison.json'
MARKS = ('<!-- tools/maintenance/compare_libraries.py -->', '<!-- end -->')
# With the distribution whose version the table says.
LIBRARIES = {'convnext_mm': None, 'mmpretrain': 'onedl-mmpretrain', 'timm': 'timm'}
ARCH = dict(depths=[1, 2, 3, 1], channels=[8, 12, 16, 20])
IMAGE = torch.rand(2, 3, 67, 93, generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5


def build(library: str, arch: dict = ARCH, **settings: object) -> nn.Module:
    """A backbone that emits the maps of all stages."""
    if library == 'convnext_mm':
        from convnext_mm import ConvNeXt

        return ConvNeXt(arch, **settings)
    if library == 'mmpretrain':
        from mmpretrain.models import ConvNeXt as Peer

        maps = dict(out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
        return Peer(arch, **maps, **settings)
    import timm

    v2 = settings.pop('use_grn', False)
    return timm.create_model(
        f'convnext{"v2" * v2}_tiny',
        features_only=True,
        depths=arch['depths'],
        dims=arch['channels'],
        **settings,
    )


def works(call: Callable[[], object]) -> bool:
    try:
        call()
    except (AssertionError, RuntimeError, TypeError, ValueError):
        return False
    return True


def maps_with_norms(library: str) -> str:
    """Whether each of four maps has mean 0 over its channels, as a new LayerNorm
    leaves it."""
    model = build(library)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or name.endswith('gamma'):  # of no LayerNorm
                weight.div_(weight.std() if weight.ndim > 1 else weight)
        maps = model(IMAGE)
    means = [float(map.mean(1).abs().max()) for map in maps]
    normed = sum(mean < 1e-3 for mean in means)
    return f'{len(maps)} maps, {normed} with a LayerNorm'


def second_version(library: str) -> str:
    return 'yes' if works(lambda: build(library, use_grn=True)(IMAGE)) else 'no'


def recomputing(library: str) -> str:
    """Whether gradients stay with gradient checkpointing."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        recomputes = dict(with_cp=on) if library != 'timm' else {}
        model = build(library, **recomputes)
        if library == 'timm' and on:
            model.set_grad_checkpointing()
        sum(map.square().sum() for map in model(IMAGE)).backward()
        gradients.append([p.grad for p in model.parameters()])
    same = all(map(torch.allclose, *gradients))
    return 'yes' if same else 'no'


def strides(library: str) -> str:
    """The stride of the last map for each ``output_stride`` that is taken."""
    image, taken = torch.rand(1, 3, 64, 64), []
    for stride in (8, 16, 32):
        settings = {} if stride == 32 else dict(output_stride=stride)
        with contextlib.suppress(TypeError):
            map = build(library, **settings)(image)[-1]
            taken.append(str(64 // map.shape[-1]))
    return ', '.join(taken)


def layer_ids(library: str) -> str:
    """Parameters of ConvNeXt-T and -B whose layer id is the published one."""
    published = json.loads((ROOT / 'tests/data/layer_ids.json').read_text())
    right = total = 0
    for arch in ('tiny', 'base'):
        facts = published[arch]
        model, powers = _powers(library, arch)
        for name, power in zip(_published_names(model), powers, strict=True):
            total += 1
            id_ = facts['num_layers'] + 1 - power
            right += facts['layer_wise'].get(f'backbone.{name}') == id_
    return f'{right} of {total}'


def _powers(library: str, arch: str) -> tuple[nn.Module, list[int]]:
    """A backbone and, for each of its parameters, the power of the decay rate that
    multiplies the learning rate."""
    if library == 'timm':
        import timm
        from timm.optim import param_groups_layer_decay

        model = timm.create_model(f'convnext_{arch}', num_classes=0)
        powers = {
            parameter: -round(math.log2(group['lr_scale']))
            for group in param_groups_layer_decay(model, layer_decay=0.5)
            for parameter in group['params']
        }
        return model, [powers[parameter] for parameter in model.parameters()]
    model = build(library, arch)
    depths = [
        model.get_layer_depth(f'backbone.{name}', 'backbone.')
        for name, _ in model.named_parameters()
    ]
    return model, [count - 1 - depth for depth, count in depths]


def _published_names(model: nn.Module) -> list[str]:
    """Those that the paper's code has for the parameters."""
    from convnext_mm import convert_state_dict

    state = {
        name: torch.full_like(parameter, number)
        for number, (name, parameter) in enumerate(model.named_parameters())
    }
    names = {
        int(value.flatten()[0]): name
        for name, value in convert_state_dict(state)[0].items()
    }
    # What has no place in a backbone is a classifier's last norm.
    return [names.get(number, 'norm.weight') for number in range(len(state))]


def sample_files(library: str) -> str | None:
    """Of the sample checkpoints of every family those that load, by the library's
    own means, and give the recorded features."""
    shared = Path(os.environ.get('CONVNEXT_MM_SHARED', ROOT.parent / 'shared'))
    folder = shared / 'reference' / 'checkpoints'
    if not folder.is_dir():
        return None
    expected = np.load(folder / 'expected.npz')
    files = [
        path
        for path in sorted(folder.iterdir())
        if f'{path.stem}/out0' in expected.files
    ]
    image = torch.from_numpy(expected['input'])
    right = 0
    for path in files:
        wanted = [torch.from_numpy(expected[f'{path.stem}/out{i}']) for i in range(4)]
        right += any(
            _largest_error(maps, wanted) < TOLERANCE
            for maps in _features(library, path, image)
        )
    return f'{right} of {len(files)}'


def _largest_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _features(library: str, path: Path, image: Tensor) -> Iterator[list[Tensor]]:
    """Normed maps of a network with a file's weights, for each way to load them."""
    from convnext_mm.checkpoint.load import read_network

    spec = read_network(path)[1].spec
    arch = dict(depths=spec.depths, channels=spec.channels)
    settings = dict(use_grn=True) if spec.use_grn else {}
    if library == 'timm':
        own = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
        ways = (
            dict(checkpoint_path=str(path)),
            own,
            dict(own, pretrained_strict=False),
        )
        ways = [dict(way, conv_mlp=mlp) for way in ways for mlp in (False, True)]
    elif library == 'mmpretrain':
        settings |= dict(layer_scale_init_value=0) if spec.use_grn else {}
        ways = [{}, dict(prefix='backbone.'), dict(whole=True)]
    else:
        ways = [{}]
    for way in ways:
        with contextlib.suppress(
            AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError
        ):
            yield _loaded(library, path, arch, settings, way, image)


def _loaded(
    library: str, path: Path, arch: dict, settings: dict, way: dict, image: Tensor
) -> list[Tensor]:
    if library == 'timm':
        import timm

        model = timm.create_model(
            f'convnext{"v2" * bool(settings)}_tiny',
            num_classes=0,
            depths=arch['depths'],
            dims=arch['channels'],
            **way,
        )
        model.eval()
        with torch.no_grad():
            maps = model.forward_intermediates(image, intermediates_only=True)
    else:
        init = dict(type='Pretrained', checkpoint=str(path), **way)
        if way.pop('whole', False):  # a detector's
            from mmengine.runner import load_checkpoint

            model = build(library, arch, **settings)
            load_checkpoint(nn.ModuleDict(dict(backbone=model)), str(path))
        else:
            model = build(library, arch, init_cfg=init, **settings)
            model.init_weights()
        model.eval()
        for i in range(4):
            model.get_submodule(f'norm{i}').register_forward_hook(
                lambda module, inputs, output: inputs[0]
            )
        with torch.no_grad():
            maps = model(image)
    return [
        F.layer_norm(map.movedim(1, -1), map.shape[1:2], eps=1e-6).movedim(-1, 1)
        for map in maps
    ]


# Writes two files and loads them; says what came of each. Without this package, so
# that its gate does not stand before the others' doors.
TRY_FILES = """
import json, logging, os, sys, warnings
warnings.filterwarnings('ignore')
logging.disable()
import torch
library, folder = sys.argv[1:]
arch = dict(depths=[1, 2, 3, 1], channels=[8, 12, 16, 20])

class Payload:
    def __reduce__(self):
        return os.mkdir, (folder + '/run',)

def build(checkpoint=None):
    if library == 'timm':
        import timm
        return timm.create_model('convnext_tiny', depths=arch['depths'], num_classes=0,
            dims=arch['channels'], checkpoint_path=checkpoint or '')
    if library == 'mmpretrain':
        from mmpretrain.models import ConvNeXt
    else:
        from convnext_mm import ConvNeXt
    init = dict(type='Pretrained', checkpoint=checkpoint) if checkpoint else None
    model = ConvNeXt(arch, init_cfg=init)
    if checkpoint:
        model.init_weights()
    return model

def came(state):
    torch.save(state, folder + '/x.pth')
    try:
        build(folder + '/x.pth')
    except Exception:
        return 'refused'
    return 'loaded'

state = build().state_dict()
code = came(dict(state, payload=Payload()))
del state[next(name for name in state if '.0.0.' in name or 'blocks.0.' in name)]
with open(folder + '/came.json', 'w') as file:
    ran = os.path.isdir(folder + '/run')
    json.dump(dict(code=code, ran=ran, lacking=came(state)), file)
"""


@functools.cache
def _try_files(library: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, '-c', TRY_FILES, library, folder],
            check=True,
            capture_output=True,
        )
        return json.loads(Path(folder, 'came.json').read_text())


def lacking(library: str) -> str:
    """What becomes of a file that lacks the weights of a convolution."""
    ends = dict(refused='refused', loaded='loads, with a warning')
    return ends[_try_files(library)['lacking']]


def code(library: str) -> str:
    """Whether what a pickle asks to call is called when it is loaded."""
    found = _try_files(library)
    return 'run' if found['ran'] else f'not run, {found["code"]}'


def classifiers(library: str) -> str:
    """Released ConvNeXt classifiers by name."""
    if library == 'convnext_mm':
        from convnext_mm.apis.zoo import models

        found = [m for m in models() if m.weights and 'classification' in m.tasks]
    elif library == 'mmpretrain':
        from mmpretrain import list_models

        found = list_models('convnext*', task='Image Classification')
    else:
        import timm

        found = timm.list_pretrained('convnext*')
    return str(len(found))


def backbones(library: str) -> str:
    """Kinds of network that the library has a backbone of, by its own list."""
    if library == 'convnext_mm':
        from convnext_mm.models.backbone import StagedBackbone

        return str(len(StagedBackbone.__subclasses__()))
    if library == 'mmpretrain':
        from mmpretrain.models import backbones as package
        from mmpretrain.models.backbones.base_backbone import BaseBackbone
    else:
        import timm

        return f'{len(timm.list_modules())} modules'
    kinds = [vars(package)[name] for name in package.__all__]
    return str(sum(issubclass(kind, BaseBackbone) for kind in kinds))


def pretraining(library: str) -> str:
    """Whether it pretrains a ConvNeXt without labels."""
    if library != 'mmpretrain':
        return 'no'
    from mmengine.registry import MODELS

    found = [MODELS.get(f'mmpretrain.{name}') for name in ('SparK', 'SparseConvNeXt')]
    return 'SparK' if all(found) else 'no'


# Rows that are read from results of the benchmark.
MEASURED = {'memory': SAVED, 'step': TRAIN, 'step-avx2': TRAIN + AVX2}


def measured(library: str, file: str) -> list[float]:
    """Bytes or milliseconds in fp32, and with bf16 autocast where that was measured."""
    network = 'lean' if library == 'convnext_mm' else library
    values = (Result(file).value(network, dtype) for dtype in ('fp32', 'amp'))
    return [value for value in values if value is not None]


def kept(library: str) -> str:
    values = measured(library, MEASURED['memory'])
    return ' / '.join(f'{value / 2**20:.0f} MiB' for value in values)


def step(library: str, file: str = TRAIN) -> str:
    values = measured(library, file)
    return ' / '.join(f'{value:.0f} ms' for value in values)


# What is asked, as the table says it, and what answers.
ROWS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    'maps': ('maps of an image of 67 x 93', maps_with_norms),
    'v2': ('ConvNeXt V2', second_version),
    'strides': ('strides of the last map', strides),
    'recompute': ('gradient checkpointing, same gradients', recomputing),
    'layers': ("parameters with the paper's layer id, T and B", layer_ids),
    'files': (
        'sample files of 9 checkpoint families that load and give their features',
        sample_files,
    ),
    'lacking': ('a file that lacks a convolution', lacking),
    'code': ('code in a pickled file', code),
    'memory': ('memory kept for backward, ConvNeXt-T', kept),
    'step': ('train step, ConvNeXt-T', step),
    'step-avx2': ('train step, ConvNeXt-T', functools.partial(step, file=TRAIN + AVX2)),
    'classifiers': ('released ConvNeXt classifiers by name', classifiers),
    'backbones': ('kinds of backbone', backbones),
    'pretraining': ('self-supervised pretraining of a ConvNeXt', pretraining),
}


def try_rows(names: list[str]) -> dict[str, dict[str, str | None]]:
    """Cells by row and library."""
    with contextlib.redirect_stdout(io.StringIO()):  # of what the libraries say
        return {
            name: {library: ROWS[name][1](library) for library in LIBRARIES}
            for name in names
        }


def table(result: dict) -> str:
    """The README's, of what a file of results holds."""
    body = [
        [_label(name), *(cells[library] for library in LIBRARIES)]
        for name, cells in result['rows'].items()
    ]
    versions = result['versions']
    head = [f'{name} {versions.get(name, "")}'.strip() for name in LIBRARIES]
    return markdown([[f'PyTorch {versions["torch"]}', *head], *body])


def _label(name: str) -> str:
    if name not in MEASURED:
        return ROWS[name][0]
    content = Result(MEASURED[name]).content
    dtypes = 'fp32' if name == 'step-avx2' else 'fp32 / bf16 autocast'
    isa = '' if name == 'memory' else f'one thread with {content["machine"]["isa"]}, '
    return f'{ROWS[name][0]}, {dtypes}, {isa}PyTorch {content["versions"]["torch"]}'


def fill(text: str, result: dict) -> str:
    """``text`` with the table between its marks."""
    start, end = MARKS
    pattern = f'{re.escape(start)}\n.*?{re.escape(end)}'
    filled, count = re.subn(
        pattern, lambda _: f'{start}\n{table(result)}\n{end}', text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(
            f'error: README.md needs {start} once, it has it {count} times'
        )
    return filled


def versions() -> dict[str, str]:
    """Those of the others, and of PyTorch."""
    others = {library: version(name) for library, name in LIBRARIES.items() if name}
    return dict(others, torch=torch.__version__.partition('+')[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('rows', nargs='*', metavar='ROW', help=f'of {", ".join(ROWS)}')
    parser.add_argument('--write', action='store_true', help='keep all rows')
    args = parser.parse_args(argv)
    unknown = sorted({*args.rows} - ROWS.keys())
    if unknown or (args.write and args.rows):
        parser.error(
            f'no row {", ".join(unknown)}: one of {", ".join(ROWS)}'
            if unknown
            else '--write keeps all rows: name none'
        )
    warnings.filterwarnings('ignore')
    logging.disable()
    rows = try_rows(args.rows or list(ROWS))
    for name, cells in rows.items():
        print(f'{name}: {ROWS[name][0]}')
        for library, cell in cells.items():
            print(f'    {library:12} {cell if cell is not None else "not tried"}')
    if not args.write:
        return 0
    lacks = [name for name, cells in rows.items() if None in cells.values()]
    if lacks:
        raise SystemExit(
            f'error: nothing is written, for {", ".join(lacks)} could not be tried: '
            'CONVNEXT_MM_SHARED names the folder of sample checkpoints'
        )
    result = dict(
        command='python tools/maintenance/compare_libraries.py --write',
        versions=versions(),
        rows=rows,
    )
    readme = ROOT / 'README.md'
    filled = fill(readme.read_text(), result)
    RESULT.write_text(json.dumps(result, indent=2) + '\n')
    readme.write_text(filled)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
