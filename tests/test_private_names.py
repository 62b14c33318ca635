"""Names that PyTorch does not promise: all are listed, and none is needed."""

import ast
import functools
import importlib.util

import pytest
import torch

from convnext_mm import ConvNeXt, private_names
from convnext_mm.models import block
from convnext_mm.private_names import PRIVATE_NAMES, has
from repo import ROOT

# Files that ask themselves, and say why they cannot do without.
EXEMPT = {
    # Runs without this package.
    'compat/mmcv_ops/operators.py'
}
ALLOWED = {
    # Ends in a refusal that says what to do: reading a pickle has no plain way.
    'torch._weights_only_unpickler',
    # Names in pickles, compared as text.
    'torch._utils',
    # Asked with getattr, and what PyTorch offers in one dtype only.
    'torch.ops.aten.mm',
}


def private_names_in(source: str) -> set[str]:
    """Dotted names of PyTorch and Triton with a private part, and operators."""
    tree, imported, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split('.')[0]
                imported[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f'{node.module}.{alias.name}'
    names = set(imported.values())
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in imported:
            names.add('.'.join([imported[node.id], *parts]))
    for name in names:
        top, *parts = name.split('.')
        private = any(p.startswith('_') and not p.startswith('__') for p in parts)
        operator = parts[:2] in (['ops', 'aten'], ['ops', 'mkldnn']) and len(parts) > 2
        knob = top == 'triton' and parts[:1] == ['knobs']
        if top in ('torch', 'triton', 'torchvision') and (private or operator or knob):
            found.add(name)
    # Of torch.a, torch.a._b and torch.a._b.c the longest stands for all.
    return {n for n in found if not any(o.startswith(f'{n}.') for o in found)}


def known(name: str) -> bool:
    return any(
        name == listed or name.startswith(f'{listed}.')
        for listed in (*PRIVATE_NAMES, *ALLOWED)
    )


def test_all_are_listed():
    package, found = ROOT / 'convnext_mm', set()
    for path in package.rglob('*.py'):
        if str(path.relative_to(package)) not in EXEMPT:
            found |= private_names_in(path.read_text())
    assert {name for name in found if not known(name)} == set()
    for listed in PRIVATE_NAMES:
        assert any(n == listed or n.startswith(f'{listed}.') for n in found), listed


def test_the_search_finds_them():
    assert private_names_in(
        'import torch\nfrom torch import _C\nfrom torch.utils import data\n'
        'torch.nn.Linear(torch._a.b, _C._c, torch.ops.aten.mul.out, torch.__version__)'
    ) == {'torch._a.b', 'torch._C._c', 'torch.ops.aten.mul.out'}


@pytest.fixture
def without(monkeypatch):
    """A PyTorch that lacks one name, as far as the package asks; what is logged."""
    logged = []
    look = private_names._has.__wrapped__

    def import_module(name):
        raise ImportError(f'no {name}')

    def lack(name):
        monkeypatch.setattr(private_names, 'import_module', import_module)
        asked = functools.cache(lambda other: other != name or look(other))
        monkeypatch.setattr(private_names, '_has', asked)
        return logged

    monkeypatch.setattr(
        private_names, 'print_log', lambda text, *arguments: logged.append(text)
    )
    return lack


def run(model):
    x = torch.rand(2, 3, 64, 64, generator=torch.manual_seed(0)).requires_grad_()
    outputs = model(x)
    sum(output.square().sum() for output in outputs).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('name', PRIVATE_NAMES)
def test_without_it_the_numbers_are_the_same(name, without):
    arch = dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32])
    model = ConvNeXt(arch, impl='auto')
    plain = ConvNeXt(arch, impl='eager')
    plain.load_state_dict(model.state_dict())
    expected = run(plain)
    logged = without(name)
    for ours, theirs in zip(run(model), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    model.eval().switch_to_deploy()
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    has(name)  # some are asked elsewhere: in the benchmark, for the interpreter
    assert len(logged) == 1
    assert name in logged[0] and PRIVATE_NAMES[name] in logged[0]


def test_lean_is_eager_without_its_operators(without):
    model = ConvNeXt('atto', impl='lean')
    x = torch.rand(1, 3, 32, 32)
    assert block.select_impl('lean', x) is block.IMPLEMENTATIONS['lean']
    without('torch.ops.aten.gelu_backward')
    assert block.select_impl('lean', x) is block.IMPLEMENTATIONS['eager']
    assert len(model(x)) == 4


def test_what_every_proven_version_has():
    """None of the log lines above is what people see every day."""
    with_triton = importlib.util.find_spec('triton') is not None
    assert [
        name
        for name in PRIVATE_NAMES
        if (with_triton or not name.startswith('triton.')) and not has(name)
    ] == []
