"""Every error leads to its entry in docs/troubleshooting.md."""

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import convnext_mm
from convnext_mm.apis.config import short_errors
from convnext_mm.cli import main
from convnext_mm.compat.mmcv_ops import __main__ as installer
from convnext_mm.engine.errors import OTHER, TROUBLESHOOTING, ConfigError, address_of
from repo import ROOT

PAGE = (ROOT / TROUBLESHOOTING).read_text()


def anchor(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


def entries() -> dict[str, str]:
    """The text of each, by its anchor."""
    text = re.sub(r'(?ms)^```.*?^```$', lambda m: m[0].replace('#', ' '), PAGE)
    parts = re.split(r'(?m)^#{2,3} (.+)$', text)[1:]
    return {anchor(h): body for h, body in zip(parts[::2], parts[1::2])}


def error_classes() -> list[type[Exception]]:
    """Those that the package defines. Names without Error end a run and are none."""
    found = set()
    for module in pkgutil.walk_packages(convnext_mm.__path__, 'convnext_mm.'):
        # A kernel's module imports where Triton is; the first one runs a command.
        if '.triton' in module.name or module.name == 'convnext_mm.__main__':
            continue
        for _, item in inspect.getmembers(
            importlib.import_module(module.name), inspect.isclass
        ):
            ours = item.__module__.startswith('convnext_mm.')
            if ours and issubclass(item, Exception) and item.__name__.endswith('Error'):
                found.add(item)
    return sorted(found, key=lambda item: item.__name__)


ERRORS = error_classes()


def test_the_errors_are_found():
    assert {error.__name__ for error in ERRORS} >= {
        'CheckpointError',
        'ConfigError',
        'DataError',
        'OperatorsError',
        'TrainingError',
        'UnreadableError',
    }
    assert {*convnext_mm.CheckpointError.__subclasses__()} < {*ERRORS}


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: error.__name__)
def test_each_has_an_entry(error):
    """Of its own, which names it and is named in its docstring."""
    assert 'anchor' in vars(error), f'{error.__name__} has no anchor'
    assert re.search(rf'\*{error.__name__}\*', entries()[error.anchor])
    assert f'``{TROUBLESHOOTING}#{error.anchor}``.' in error.__doc__


def test_entries():
    """Headings differ, and each entry says what to do: a command, a block of a
    config, or a page."""
    headings = re.findall(r'(?m)^### (.+)$', PAGE)
    assert len({anchor(h) for h in headings}) == len(headings) > 20
    for heading in headings:
        text = entries()[anchor(heading)]
        assert re.search(r'^```(bash|python)|\]\(\w+\.md', text, re.M), heading


@pytest.mark.parametrize(
    'error',
    # Which leaves through a door of its own, tested below.
    [error for error in ERRORS if error is not installer.OperatorsError],
    ids=lambda error: error.__name__,
)
def test_the_door_says_where(error):
    with pytest.raises(SystemExit) as stop, short_errors():
        raise error('the sentence')
    sentence, more = stop.value.code.splitlines()
    assert sentence == 'error: the sentence'
    assert more == f'More: {TROUBLESHOOTING}#{error.anchor}'


def test_the_door_for_what_is_not_ours(capsys):
    assert OTHER in entries()
    with pytest.raises(SystemExit) as stop, short_errors():
        raise KeyError('x')
    assert stop.value.code.splitlines()[-1] == f'More: {TROUBLESHOOTING}#{OTHER}'


def test_a_kind_without_an_entry_has_that_of_its_class():
    class Special(ConfigError):
        pass

    assert address_of(Special()) == address_of(ConfigError())


def test_a_command_says_where():
    with pytest.raises(SystemExit) as stop:
        main(['flops', 'no-such-config.py'])
    assert stop.value.code.splitlines()[-1] == f'More: {address_of(ConfigError())}'


def test_a_missing_package_says_where(monkeypatch):
    monkeypatch.setitem(sys.modules, 'convnext_mm.public', None)
    with pytest.raises(SystemExit) as stop:
        main(['flops', 'no-such-config.py'])
    *_, more = stop.value.code.splitlines()
    assert more == f'More: {TROUBLESHOOTING}#missing-package'
    assert 'missing-package' in entries()


def test_the_operators_say_where(monkeypatch, capsys):
    """Also where nothing but Python is installed."""

    def fail() -> str:
        raise installer.OperatorsError('first do this')

    monkeypatch.setattr(installer, 'status', fail)
    assert installer.main(['--status']) == 1
    sentence, more = capsys.readouterr().err.splitlines()
    assert sentence == 'stopped: first do this'
    assert more == f'More: {address_of(installer.OperatorsError())}'


def test_help_waits_for_nothing():
    """The address is known without PyTorch."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mmengine'] = None\n"
        "sys.argv[0] = 'convnext-mm'\n"
        'from convnext_mm.engine.errors import ConfigError, address_of\n'
        'print(address_of(ConfigError()))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == address_of(ConfigError())
