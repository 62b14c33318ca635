"""The command line: what its help promises, and how it ends."""

import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from convnext_mm import cli
from convnext_mm.cli import COMMANDS, main, program
from repo import ROOT, SHAPES, parsed


def run(*arguments: str, env: dict | None = None, **options) -> tuple[int, str, str]:
    """Status, output and errors of ``convnext-mm``, in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-m', 'convnext_mm', *arguments],
        env={**os.environ, 'PYTHONWARNINGS': 'ignore', **(env or {})},
        capture_output=True,
        text=True,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def leaves(command: click.Command, path: tuple[str, ...] = ()):
    """All commands, with their names."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        yield from leaves(command.get_command(context, name), (*path, name))


ALL = dict(leaves(program))


def examples(text: str) -> list[list[str]]:
    """The calls of ``convnext-mm`` in a text: words after it, without comments."""
    lines = re.findall(
        r'^[ \t]*(?:[^#\n`\']*\| ?)?convnext-mm (.*)$', text, re.MULTILINE
    )
    found = (shlex.split(line.partition(' > ')[0], comments=True) for line in lines)
    return [words for words in found if words]


def parse(words: list[str]) -> None:
    """
    Raises:
        click.ClickException: These are no arguments.
    """
    if words[0] in ('COMMAND', '--help', '-h'):
        return
    for length in (2, 1):
        command = ALL.get(tuple(words[:length]))
        if command is not None:
            rest = [word for word in words[length:] if word not in ('...', '--help')]
            command.make_context(' '.join(words[:length]), rest)
            return
    raise click.UsageError(f'no command: {words}')


@contextmanager
def exits(status: int):
    """The block ends the program with this status; click's own --help with 0."""
    try:
        yield
    except SystemExit as error:
        assert error.code == status
    else:
        assert status == 0


@pytest.mark.parametrize('path', ALL, ids=' '.join)
def test_help_with_examples(path, capsys):
    with exits(0):
        main([*path, '--help'])
    said = capsys.readouterr().out
    assert 'Usage: convnext-mm' in said and 'Examples:' in said
    group = program.get_command(click.Context(program), path[0])
    epilog = ALL[path].epilog or group.epilog
    shown = examples(epilog)
    assert shown, 'no example'
    for words in shown:
        parse(words)
    for param in ALL[path].params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help, f'{param.opts} says nothing'


def test_the_programs_help(capsys):
    with exits(0):
        main(['--help'])
    said = capsys.readouterr().out
    assert all(re.search(rf'^  {name} +\S', said, re.MULTILINE) for name in COMMANDS)
    for words in examples(program.epilog):
        parse(words)
    modules = {p.stem for p in Path(cli.__file__).parent.glob('*.py')}
    names = {module.replace('_', '-') for module in modules - {'__init__', 'options'}}
    assert set(COMMANDS) == names


WITHOUT_TORCH = """
import sys
sys.argv = ['convnext-mm']
from convnext_mm.cli import COMMANDS, main
for name in COMMANDS:
    main([name, '--help'])
main(['completion', 'bash'])
main(['configs'])
from convnext_mm.cli.options import complete_model
names = [item.value for item in complete_model(None, None, 'upernet_convnext-t')]
assert names[0] == 'upernet_convnext-t', names
heavy = {'torch', 'mmengine', 'cv2', 'matplotlib', 'numpy'} & set(sys.modules)
assert not heavy, heavy
import convnext_mm
assert convnext_mm.ConvNeXt.__name__ == 'ConvNeXt' and 'torch' in sys.modules
try:
    convnext_mm.nothing
except AttributeError as error:
    assert 'nothing' in str(error)
else:
    raise AssertionError
"""


def test_help_needs_no_pytorch():
    command = [sys.executable, '-W', 'ignore', '-c', WITHOUT_TORCH]
    subprocess.run(command, check=True, capture_output=True)


def test_mistakes(capsys):
    for arguments, reason in (
        (['zo'], "no command 'zo': did you mean zoo"),
        (['frobnicate'], "no command 'frobnicate'"),
        (['infer'], "Missing argument 'MODEL'"),
        (['train', 'x.py', '--cfg-options', 'novalue'], "'novalue' is not KEY=VALUE"),
        (['train', 'x.py', '--launcher', 'rsh'], "'rsh' is not one of"),
        (['train', 'x.py', '--gpus', '0'], '0 is not in the range'),
        (['demo', '--require', 'mIoU'], "'mIoU' is not METRIC=NUMBER"),
        (['flops', 'x.py', '--shape', '0', '3'], '0 is not in the range'),
        (['completion', 'tcsh'], "'tcsh' is not one of"),
    ):
        with exits(2):
            main(arguments)
        said = capsys.readouterr().err
        assert reason in said and 'Traceback' not in said


def test_several_values_at_once():
    """As OpenMMLab's tools take them, or one by one as click does."""
    options = dict(a=1, b=[(1, 2), (3, 4)], c='x')
    given = ['a=1', 'b=[(1,2),(3,4)]', 'c=x']
    at_once = parsed('train', 'x.py', '--cfg-options', *given, '--amp')
    single = [word for pair in given for word in ('--cfg-options', pair)]
    assert at_once == parsed('train', 'x.py', *single, '--amp')
    assert at_once['cfg_options'] == options
    assert at_once['amp'] and at_once['config'] == 'x.py'
    assert parsed('train', 'x.py', '--resume')['resume'] == 'auto'
    assert parsed('train', 'x.py', '--resume', 'y.pth')['resume'] == 'y.pth'
    assert parsed('train', 'x.py', '--profile')['profile'] == 3
    assert parsed('train', 'x.py')['resume'] is None


def test_several_processes(monkeypatch):
    """``--gpus`` starts the same command in the launcher."""
    from convnext_mm.engine import launcher

    seen = []
    monkeypatch.setattr(launcher, 'main', lambda words: seen.append(list(words)) or 7)
    monkeypatch.setenv('GPUS', '')
    assert main(['train', SHAPES, '--gpus', '3', '--amp']) == 7
    assert os.environ['GPUS'] == '3'
    assert main(['test', SHAPES, 'x.pth', '--gpus=2']) == 7
    end = ['--launcher', 'pytorch']
    assert seen == [
        ['-m', 'convnext_mm', 'train', SHAPES, '--amp', *end],
        ['-m', 'convnext_mm', 'test', SHAPES, 'x.pth', *end],
    ]


def test_completion(tmp_path):
    for shell in ('bash', 'zsh', 'fish'):
        status, out, _ = run('completion', shell)
        assert status == 0 and '_CONVNEXT_MM_COMPLETE' in out
    # What that asks for.
    for words, expected in (
        ('convnext-mm in', 'plain,infer'),
        ('convnext-mm infer mmseg::upernet_convnext-x', 'upernet_convnext-xl-in22k'),
        ('convnext-mm zoo --ta', '--task'),
        ('convnext-mm train mask-rcnn_convnext-at', 'plain,mask-rcnn_convnext-atto'),
        ('convnext-mm infer my_con', 'file,my_con'),
    ):
        command = ['-c', 'import sys; from convnext_mm.cli import main; main()']
        env = {
            '_CONVNEXT_MM_COMPLETE': 'bash_complete',
            'COMP_WORDS': words,
            'COMP_CWORD': str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        assert expected in done.stdout
        # A shell that is told to name files forgets the names before.
        assert ('file,' in done.stdout) is expected.startswith('file')


def test_an_environment_that_lacks_mmengine(tmp_path):
    (tmp_path / 'mmengine.py').write_text('raise ModuleNotFoundError(name="mmengine")')
    status, _, errors = run('zoo', env=dict(PYTHONPATH=f'{ROOT}:{tmp_path}'))
    assert status == 1 and errors.startswith('error: convnext_mm needs mmengine')
    assert '`convnext-mm doctor`' in errors and 'Traceback' not in errors


def test_configs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(['configs'])
    assert capsys.readouterr().out.strip() == str(ROOT / 'configs')
    main(['configs', '--copy', 'mine'])
    assert (tmp_path / 'mine/_base_/datasets/shapes_instance.py').is_file()
    with pytest.raises(SystemExit, match='mine exists: name a new folder'):
        main(['configs', '--copy', 'mine'])


def test_version(capsys):
    with exits(0):
        main(['--version'])
    assert re.fullmatch(
        r'convnext-mm, version \d+\.\d+\.\d+\n', capsys.readouterr().out
    )


def test_a_reader_that_has_seen_enough():
    command = f'{shlex.quote(sys.executable)} -W ignore -m convnext_mm zoo | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    assert 'BrokenPipe' not in done.stderr
