"""Findings on PyTorch, GPUs, and what runs on them."""

import re
from collections.abc import Iterator

from .causes import why
from .evidence import OPENMMLAB, Evidence, allows, release
from .finding import Finding, State, not_examined

OLDEST_TORCH = '2.4'
SAFE_TORCH = '2.10'  # as of convnext_mm.checkpoint.reader, which imports PyTorch
INSTALL_TORCH = '`pip install torch torchvision`'
# What impl='auto' may pick.
BLOCKS = {
    'eager': 'plain PyTorch',
    'lean': 'fused, stores half for backward',
    'triton': 'fused kernels',
}


def torch(evidence: Evidence) -> Iterator[Finding]:
    """Whether it imports, and its version."""
    version, error = evidence.probes['torch']
    installed = evidence.versions.get('torch')
    if error:
        if not installed and "No module named 'torch'" in error:
            yield Finding('torch', 'problem', 'is not installed', INSTALL_TORCH)
            return
        advice = why(error, 'torch') or (
            '`pip install --force-reinstall torch torchvision`; if it stays, look at '
            'PYTHONPATH and LD_LIBRARY_PATH'
        )
        name = ' '.join(['torch', *filter(None, [installed])])
        yield Finding('torch', 'problem', f'{name} does not import: {error}', advice)
    elif release(version) < release(OLDEST_TORCH):
        yield Finding(
            'torch',
            'problem',
            f'{version}; {OLDEST_TORCH} or later is needed',
            '`pip install --upgrade torch torchvision`',
        )
    elif release(version) < release(SAFE_TORCH):
        yield Finding(
            'torch',
            'note',
            f'{version} cannot read pickles safely: checkpoints that are pickles '
            '(.pth, .pt), those of --resume among them, are refused',
            f'torch {SAFE_TORCH} or later, .safetensors files, or '
            'CONVNEXT_MM_TRUST_PICKLE=FILE for a file you made',
        )
    else:
        yield Finding('torch', 'ok', version)


def torchvision(evidence: Evidence) -> Iterator[Finding]:
    """Whether it belongs to the PyTorch that is there."""
    version = evidence.versions.get('torchvision')
    probe, torch = evidence.probes['torchvision'], evidence.probes['torch']
    if not version and probe.error:
        needed = any(evidence.installed(OPENMMLAB[name]) for name in OPENMMLAB)
        state: State = 'problem' if needed else 'note'
        yield Finding(
            'torchvision', state, 'is not installed', _advice_vision(evidence)
        )
        return
    if torch.error:
        yield not_examined('torchvision', 'torch does not import', version or '')
        return
    pins = (
        requirement.partition(';')[0]
        for requirement in evidence.requires('torchvision') or ()
        if re.match(r'torch\b', requirement)
    )
    for pin in pins:
        if not allows(pin, torch.value):
            yield Finding(
                'torchvision',
                'problem',
                f'{version} is for {pin.strip()}, and torch is {torch.value}',
                _advice_vision(evidence),
            )
            return
    builds = {v.partition('+')[2] for v in (version or '', torch.value)} - {''}
    if probe.error or len(builds) > 1:
        fault = probe.error or f'its build is another than of torch {torch.value}'
        message = f'{version} does not work: {fault}'
        again = f'"torchvision=={(version or "").partition("+")[0]}"'
        advice = f'`pip install --force-reinstall --no-deps {again}`'
        advice += ', from the index that torch is from'
        yield Finding('torchvision', 'problem', message, advice)
        return
    yield Finding('torchvision', 'ok', version or 'imports')


def _advice_vision(evidence: Evidence) -> str:
    torch = evidence.probes['torch'].value or evidence.versions.get('torch')
    if not torch:
        return INSTALL_TORCH
    wanted = torch.partition('+')[0]
    # pip then takes the torchvision that fits, and leaves torch as it is.
    return f'`pip install --upgrade torchvision "torch=={wanted}"`'


def gpus(evidence: Evidence) -> Iterator[Finding]:
    """The GPUs, and whether this PyTorch runs on them."""
    smi = evidence.probes.get('nvidia-smi')
    seen = sorted(set((smi.value or '').splitlines())) if smi else []
    there = f'nvidia-smi sees {"; ".join(seen)}' if seen else ''
    if evidence.probes['torch'].error:
        yield not_examined('GPU', 'torch does not import', there)
        return
    found, error = evidence.probes['gpus']
    if error:
        advice = 'update the driver, or install the PyTorch for its CUDA'
        yield Finding('GPU', 'problem', f'asking for GPUs fails: {error}', advice)
        return
    build = f'CUDA {found["cuda"]}' if found['cuda'] else 'CPU'
    if found['hip']:
        build = f'ROCm {found["hip"]}'
    visible = evidence.environ.get('CUDA_VISIBLE_DEVICES')
    if found['gpus']:
        driver = f', driver {seen[0].rpartition(", ")[2]}' if seen else ''
        yield Finding('build', 'ok', f'{build}{driver}')
        for number, gpu in enumerate(found['gpus']):
            yield _gpu(number, gpu, found['archs'])
    elif smi is None:
        yield Finding('GPU', 'ok', f'none; {build} build, everything runs on the CPU')
    elif visible is not None and not re.match(r'\d|GPU|MIG', visible):
        message = f'hidden by CUDA_VISIBLE_DEVICES={visible!r}; {there}'
        yield Finding('GPU', 'note', message, 'unset it to use them')
    elif smi.error:
        yield Finding(
            'GPU',
            'problem',
            f'nvidia-smi fails ({smi.error}), and torch sees no GPU',
            'load or install the driver (a reboot after its update); start a '
            'container with `docker run --gpus all`',
        )
    elif not found['cuda']:
        yield Finding(
            'GPU',
            'problem',
            f'{there}, and torch is a {build} build',
            '`pip install --force-reinstall torch torchvision`, without the index of '
            'CPU builds',
        )
    else:
        yield Finding(
            'GPU',
            'problem',
            f'{there}, and torch ({build}) sees none: {found["fault"] or "no reason"}',
            'update the driver, or install the PyTorch for its CUDA (`nvidia-smi` '
            'prints which): https://pytorch.org/get-started',
        )


def _gpu(number: int, gpu: tuple, archs: list[str]) -> Finding:
    name, (major, minor), memory, fault = gpu
    message = f'{name}, {memory / 2**30:.0f} GiB, compute capability {major}.{minor}'
    if not fault and not has_code_for(major, minor, archs):
        fault = f'this PyTorch has code for {", ".join(archs)}'
    if not fault:
        return Finding(f'GPU {number}', 'ok', message)
    return Finding(
        f'GPU {number}',
        'problem',
        f'{message}: {fault}',
        'install a PyTorch that supports it (https://pytorch.org/get-started), or '
        'leave it out with CUDA_VISIBLE_DEVICES',
    )


def has_code_for(major: int, minor: int, archs: list[str]) -> bool:
    """Whether a build for ``['sm_80', ..., 'compute_90']`` runs on a GPU: binaries
    within one major version, what a driver compiles on all later ones."""
    for arch in archs:
        kind, _, digits = arch.partition('_')
        match = re.fullmatch(r'(\d+)(\d)([a-z]?)', digits)
        if kind not in ('sm', 'compute') or not match:
            return True  # AMD's, or what nobody has heard of
        code = int(match[1]), int(match[2])
        same = code == (major, minor)
        later = (
            code <= (major, minor)
            if kind == 'compute'
            else code[0] == major and code[1] <= minor
        )
        if same or (later and not match[3]):
            return True
    return not archs


def impl(evidence: Evidence) -> Iterator[Finding]:
    """What ``impl='auto'`` picks on each device."""
    picks, error = evidence.probes['impl']
    override = evidence.environ.get('CONVNEXT_MM_IMPL')
    asked = f'CONVNEXT_MM_IMPL={override}' if override else "impl='auto'"
    if error:
        reason = evidence.obstacle() or error
        yield not_examined('impl', reason)
        return
    for device in dict.fromkeys(pick[0] for pick in picks):
        of_device = [pick[1:] for pick in picks if pick[0] == device]
        name = 'impl, CPU' if device == 'cpu' else f'impl, {device}'
        faults = [why for _, chosen, why in of_device if chosen is None]
        if faults:
            way_out = 'CONVNEXT_MM_IMPL=eager runs plain PyTorch'
            advice = 'unset CONVNEXT_MM_IMPL' if override else way_out
            yield Finding(name, 'problem', faults[0], advice)
            continue
        dtypes: dict[str, list[str]] = {}
        for dtype, chosen, _ in of_device:
            dtypes.setdefault(chosen, []).append(dtype)
        message = f'{asked} picks ' + ', '.join(
            f'{chosen!r} ({BLOCKS.get(chosen, "not automatic")}) for {" and ".join(of)}'
            for chosen, of in dtypes.items()
        )
        if override or list(dtypes) == ['lean' if device == 'cpu' else 'triton']:
            yield Finding(name, 'note' if override else 'ok', message)
        else:
            reason = next((why for *_, why in of_device if why), 'no reason given')
            yield Finding(name, 'note', f'{message}: {reason}')
    version = evidence.versions.get('triton', 'is not installed')
    if all(pick[0] == 'cpu' for pick in picks):
        version += '; it is for NVIDIA GPUs'
    yield Finding('Triton', 'ok', version)
