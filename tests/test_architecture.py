"""The rooms of the package import downwards only, and in no circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from repo import ROOT

PACKAGE = ROOT / 'convnext_mm'
# From the top; rooms of one floor know nothing of each other. Each floor may
# import from those below it. docs/architecture.md draws it.
LADDER = (
    ('__init__', '__main__'),
    ('cli',),
    ('public',),
    ('apis',),
    ('engine',),
    ('models',),
    ('checkpoint',),
    ('ops', 'datasets', 'analysis', 'compat'),
    ('registry', 'archs', 'version', 'private_names'),
)
# What runs where head libraries are missing or broken.
WITHOUT_HEADS = ('models', 'checkpoint', 'ops', 'archs', 'registry')
HEAD_LIBRARIES = {'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
# Registered by name, and imported when it is first built.
ON_DEMAND = {'convnext_mm.models.roi_extractor'}


def modules() -> dict[str, Path]:
    """Dotted name to file, of the whole package."""
    found = {}
    for path in PACKAGE.rglob('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path, source: str | None = None) -> set[str]:
    """What a module imports, at its top or inside a function: dotted names, of
    this package those of modules; and modules that it names in a string."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = package.split('.')
                above = parts[: len(parts) - node.level + 1]
                base = '.'.join([*above, *([base] if base else [])])
            found.update(
                module if (module := f'{base}.{alias.name}') in MODULES else base
                for alias in node.names
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update({node.value} & set(MODULES) - {'convnext_mm'})
    return found - {name}


def room(module: str) -> str:
    return [*module.split('.'), '__init__'][1]


FLOORS = {room: floor for floor, rooms in enumerate(LADDER) for room in rooms}


def climbs(importer: str, imported: str) -> bool:
    above, below = room(importer), room(imported)
    return above != below and FLOORS[below] <= FLOORS[above]


def test_every_room_is_on_the_ladder():
    assert {room(name) for name in MODULES} == set(FLOORS)


def test_no_arrow_climbs():
    arrows = [
        f'{name} imports {other}'
        for name, path in MODULES.items()
        for other in imports(name, path)
        if other in MODULES and climbs(name, other)
    ]
    assert arrows == []


def test_no_circle():
    arrows = {
        name: {
            other
            for other in imports(name, path) & set(MODULES)
            # A package's own face gathers what lies in it.
            if not name.startswith(f'{other}.')
        }
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


def test_rooms_that_need_no_head_library():
    arrows = [
        f'{name} imports {other}'
        for name, path in MODULES.items()
        if room(name) in WITHOUT_HEADS and name not in ON_DEMAND
        for other in imports(name, path)
        if other.split('.')[0] in HEAD_LIBRARIES
    ]
    assert arrows == []


@pytest.mark.parametrize(
    'module, source, climbing',
    [
        ('convnext_mm.ops.lean', 'from convnext_mm.models import ConvNeXt', True),
        (
            'convnext_mm.ops.lean',
            'def f():\n    import convnext_mm.engine.runner',
            True,
        ),
        ('convnext_mm.ops.lean', 'from ..checkpoint import load', True),
        ('convnext_mm.ops.lean', 'from convnext_mm import ConvNeXt', True),
        ('convnext_mm.ops.lean', "import_module('convnext_mm.apis.train')", True),
        ('convnext_mm.ops.lean', 'from ..registry import MODELS', False),
        ('convnext_mm.ops.lean', 'from . import eager', False),
        ('convnext_mm.models.block', 'from convnext_mm.ops import lean', False),
        ('convnext_mm.engine.launch', 'from ..apis import train', True),
        ('convnext_mm.apis.train', 'from ..engine.launch import build', False),
    ],
)
def test_the_check_itself(module, source, climbing):
    """Each way to write an import is seen."""
    found = imports(module, MODULES[module], source)
    assert any(climbs(module, other) for other in found if other in MODULES) is climbing


def test_the_picture_is_the_ladder():
    """Every room is drawn, and every arrow of the picture descends."""
    page = (ROOT / 'docs' / 'architecture.md').read_text()
    picture = re.search(r'```mermaid\n(.*?)```', page, re.DOTALL)[1]
    arrows = [
        (above, below)
        for above, several in re.findall(r'(\w+)(?:\[".*?"\])? --> (.+)', picture)
        for below in several.split(' & ')
    ]
    drawn = {name for arrow in arrows for name in arrow}
    assert drawn == set(FLOORS) - {'__init__', '__main__', 'version'} | {'tools'}
    floors = {**FLOORS, 'tools': -1}
    assert [arrow for arrow in arrows if floors[arrow[0]] >= floors[arrow[1]]] == []
    files = set(re.findall(r'`((?:\w+/)+\w+\.(?:py|sh|yml))`', page))
    places = (ROOT, PACKAGE, PACKAGE / 'ops')
    assert len(files) > 20
    assert [f for f in files if not any((p / f).is_file() for p in places)] == []
