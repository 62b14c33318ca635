"""What the documents tell to write or to call works: every block and every command
of README.md, CONTRIBUTING.md and docs/ is run here, or by the test that is named."""

import re
import shlex
from pathlib import Path

import click
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from PIL import Image
from torch import nn

from convnext_mm import ConvNeXt
from convnext_mm.analysis.complexity import build_model
from convnext_mm.apis.config_check import check_config
from convnext_mm.cli import main, program
from doc_blocks import (
    PAGES,
    SHELL,
    Block,
    all_commands,
    anchors,
    blocks,
    commands,
    is_config,
    links,
    prose,
)
from repo import ROOT, SHAPES
from toys import ARCH

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
COMMANDS = all_commands()
OURS = [command for command in COMMANDS if command.words[0] == 'convnext-mm']
# Commands that this file runs, in an empty folder; what stands in for their files.
RUN_HERE = (
    'convnext-mm configs',
    'convnext-mm convert',
    'convnext-mm flops',
    'convnext-mm show backbone',
    'convnext-mm zoo',
)
TRAINING = 'tests/apis/test_training.py::'
DIST = TRAINING + 'test_dist_train_on_a_cpu'
SHOW = 'tests/apis/test_show.py::test_commands'
MMCV = 'tests/compat/test_mmcv_install.py::'
GPU = 'tests/tools/test_gpu_scripts.py::'
CI = '.ci/run'
# Other commands, by what they begin with: the tests that run them. The files of
# those tests name every option that a document gives such a command.
RUN_BY = {
    'convnext-mm bench': (
        'tests/apis/test_benchmark.py::test_results_and_plot',
        'tests/apis/test_benchmark_paper.py::test_throughput',
    ),
    'convnext-mm convert-data': (
        'tests/cli/test_convert_data.py::test_what_it_says',
        'tests/datasets/test_conversion.py::test_voc_masks',
    ),
    'convnext-mm demo': (TRAINING + 'test_demo_shows_and_judges',),
    'convnext-mm doctor': ('tests/apis/test_doctor.py::test_fix',),
    'convnext-mm export': (
        'tests/apis/test_export.py::test_example_without_pytorch',
        'tests/apis/test_export.py::test_command',
    ),
    'convnext-mm infer': (
        'tests/apis/test_inference.py::test_command',
        'tests/apis/test_inference.py::test_ground_truth_stays',
        'tests/apis/test_zoo.py::test_a_file_of_each_layout',
    ),
    'convnext-mm show data': (SHOW,),
    'convnext-mm show lr': (SHOW,),
    'convnext-mm show roadmap': ('tests/apis/test_show_roadmap.py::test_command',),
    'convnext-mm show run': (SHOW,),
    'convnext-mm test': (
        'tests/apis/test_published.py::test_by_name',
        'tests/apis/test_corruptions.py::test_several_processes',
        TRAINING + 'test_train_test_resume',
    ),
    'convnext-mm train': (
        TRAINING + 'test_train_test_resume',
        'tests/cli/test_cli.py::test_several_processes',
        'tests/apis/test_loggers.py::test_what_is_there_stays',
    ),
    'convnext_mm.compat.mmcv_ops': (
        MMCV + 'test_mmdet_imported_first_gets_the_operators',
    ),
    'convnext_mm.datasets': (
        'tests/tools/test_packaging.py::test_the_wheel_works_without_the_checkout',
        'tests/datasets/test_shapes.py::test_same_seed_same_files',
    ),
    'examples/run_onnx.py': (
        'tests/apis/test_export.py::test_example_without_pytorch',
    ),
    'make demo': (TRAINING + 'test_demo_shows_and_judges',),
    'make demo-seg': ('tests/apis/test_segmentors.py::test_demo_shows_and_judges',),
    'make setup': (CI,),
    'make test': (CI,),
    'pytest': (CI,),
    'tools/dist_test.sh': (DIST,),
    'tools/dist_train.sh': (DIST,),
    'tools/maintenance/compare_libraries.py': (
        'tests/docs/test_blocks_comparison.py::test_mistakes',
    ),
    'tools/maintenance/gpu_proof.sh': (
        GPU + 'test_smoke_run_of_the_proof',
        GPU + 'test_smoke_run_of_the_tuning',
    ),
    'tools/maintenance/gpu_train.sh': (
        'tests/tools/test_gpu_train.py::test_smoke_on_drawn_shapes',
    ),
    'tools/maintenance/make_benchmark_tables.py': (
        'tests/apis/test_benchmark.py::test_tables_are_current',
    ),
    'tools/maintenance/make_gallery.py': (
        'tests/docs/test_gallery.py::test_layer_decay_plot',
        'tests/docs/test_gallery.py::test_memory_pictures',
    ),
    'tools/maintenance/make_model_zoo.py': (
        'tests/tools/test_model_zoo.py::test_page_is_current',
    ),
    'tools/maintenance/time_per_pixel.py': (
        'tests/tools/test_time_per_pixel.py::test_rows_and_picture',
    ),
    'tools/slurm_train.sh': ('tests/tools/test_slurm.py::test_job_is_requeued',),
    'tools/train.py': (
        'tests/engine/test_profile_hook.py::test_detector',
        TRAINING + 'test_train_test_resume',
    ),
}
# What no test can run, and why.
NOT_RUN = {
    'cd convnext_mm': 'follows git clone',
    'git clone': 'there is no public address yet',
    'pip install': 'changes the environment; CI runs it through make setup',
    'pip wheel': 'needs a compiler for GPUs',
    'pre-commit install': 'changes the checkout',
    'source .venv/bin/activate': 'a word of the shell',
    'tools/maintenance/pack_wheels.sh': 'downloads 3 GB',
    'tools/maintenance/run_roadmap.py': 'trains for hours; its steps are trained '
    'small in tests/configs/test_roadmap.py',
}
SYSTEM = ('cp', 'df', 'hf', 'ls', 'sha256sum', 'ulimit')  # programs that are not ours
# Variables that a command begins with, and a file that tries them.
VARIABLES = {
    'CONVNEXT_MM_ATTACKS': 'tests/checkpoint/test_attacks.py',
    'CONVNEXT_MM_CACHE': 'tests/apis/test_doctor.py',
    'CONVNEXT_MM_FUZZ': 'tests/checkpoint/test_attacks.py',
    'CONVNEXT_MM_RESULTS': 'tests/checkpoint/conftest.py',
    'MALLOC_MMAP_MAX_': 'tests/tools/test_time_per_pixel.py',
    'MALLOC_TRIM_THRESHOLD_': 'tests/tools/test_time_per_pixel.py',
    'MASTER_ADDR': 'tools/maintenance/inject_faults.py',
    'NNODES': 'tools/maintenance/inject_faults.py',
    'NODE_RANK': 'tools/maintenance/inject_faults.py',
}


@pytest.mark.parametrize(
    'text, expected',
    [
        ('# no command', []),
        ('make demo  # a note', [('make demo', set())]),
        (
            'cd x && make test | tee log',
            [('cd x', set()), ('make test', set()), ('tee log', set())],
        ),
        ('python tools/train.py C \\\n  --resume', [('tools/train.py', {'--resume'})]),
        ('.venv/bin/python -m pytest tests', [('pytest', set())]),
        ('convnext-mm show lr C --out=x > y', [('convnext-mm show lr', {'--out'})]),
        ("A=1 B='x y' bash tools/x.sh", [('tools/x.sh', set())]),
    ],
)
def test_commands_of_a_block(text, expected):
    found = [*commands(Block('page', 1, 'bash', text))]
    assert [(command.head, command.options) for command in found] == expected
    if text.startswith('A='):
        assert found[0].variables == dict(A='1', B='x y')


def test_blocks_in_tabs(tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    page.write_text('=== "a"\n\n    ```console\n    $ make x\n    said\n    ```\n')
    monkeypatch.setattr('doc_blocks.ROOT', tmp_path)
    (block,) = blocks('page.md')
    assert block == Block('page.md', 4, 'console', '$ make x\nsaid\n')
    assert [command.head for command in commands(block)] == ['make x']


def test_pages_have_blocks():
    assert len(PAGES) > 12 and len(COMMANDS) > 60


@pytest.mark.parametrize('command', COMMANDS, ids=str)
def test_somebody_runs(command):
    places = RUN_BY.get(command.head, ())
    known = command.head in (*RUN_HERE, *NOT_RUN) or command.words[0] in SYSTEM
    assert known or places, f'nobody runs {command.head!r}: name who, in {__file__}'
    if not places:
        return
    sources = ''.join((ROOT / place.partition('::')[0]).read_text() for place in places)
    # What needs a GPU cannot be tried.
    gpu = {'--device'} if 'cuda' in command.words else set()
    for option in command.options - gpu:
        name = option.removeprefix('--').replace('-', '_')
        assert re.search(rf'{option}\b|\b{name}\b', sources), f'nobody tries {option}'
    for variable in command.variables:
        assert variable in (ROOT / VARIABLES[variable]).read_text()


def test_who_is_named_runs_what_stands_there():
    heads = {command.head for command in COMMANDS}
    programs = {command.words[0] for command in COMMANDS}
    variables = {name for command in COMMANDS for name in command.variables}
    unused = [head for head in (*RUN_HERE, *RUN_BY, *NOT_RUN) if head not in heads]
    unused += {*SYSTEM} - programs
    unused += VARIABLES.keys() - variables
    assert not unused, f'no document has them any more: {unused}'
    for head, places in RUN_BY.items():
        sources = ''
        for place in places:
            path, _, name = place.partition('::')
            source = (ROOT / path).read_text()
            assert f'def {name}(' in source or not name, place
            sources += source
        name = Path(head.split()[-1]).stem.rpartition('.')[2]
        name = name.removesuffix('-seg').replace('-', '[-_]')
        assert re.search(rf'\b{name}\b', sources) or places == (CI,), head


def check_arguments(words: list[str]) -> None:
    """
    Raises:
        AssertionError, click.UsageError: These are not those of a command.
    """
    found: click.Command = program
    words = [word for word in words if word not in ('...', '--help')]
    while isinstance(found, click.Group) and words and words[0] != 'COMMAND':
        name = words.pop(0)
        found = found.get_command(click.Context(found), name)
        assert found is not None, f'there is no {name}'
    if not isinstance(found, click.Group) and words:
        found.make_context(name, words)


@pytest.mark.parametrize('command', OURS, ids=str)
def test_arguments(command):
    """They are those of a command, though files are not there."""
    check_arguments([*command.words[1:]])


@pytest.mark.parametrize('page', PAGES)
def test_commands_in_sentences(page):
    for span in re.findall(r'`convnext-mm ([^`]+)`', prose(page)):
        check_arguments(shlex.split(span))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The empty one in which a block runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(word: str, prefix: str = '') -> str:
    """What a name in a document stands for; where it is that of a file, small ones
    of its kind are made."""
    path = Path(word)
    if word.startswith('timm://') or path.suffix in ('.pth', '.pt'):
        path = Path(path.name).with_suffix('.pth')
        state = ConvNeXt('atto').state_dict()  # as the small configs have it
        torch.save({prefix + name: value for name, value in state.items()}, path)
        return str(path)
    if path.suffix in ('.jpg', '.png'):
        Image.new('RGB', (64, 64)).save(path.name)
        return path.name
    if word == 'CONFIG' or (path.suffix == '.py' and not path.exists()):
        copied = ROOT / 'configs' / word.partition('/')[2]
        return str(copied if copied.is_file() else ROOT / SHAPES)
    return word


@pytest.mark.slow
@pytest.mark.parametrize(
    'command', [command for command in OURS if command.head in RUN_HERE], ids=str
)
def test_command(command, folder, monkeypatch, capsys):
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    first, *rest = command.words[1:]
    if first == 'convert':
        has_prefix = '--prefix' in rest
        prefix = rest[rest.index('--prefix') + 1] if has_prefix else ''
        rest[0] = stand_in(rest[0], prefix)
    else:
        rest = [stand_in(word) for word in rest]
        if '--shape' in rest and command.head != 'convnext-mm flops':  # in small
            size = rest.index('--shape') + 1
            rest[size : size + 2] = '64', '64'
    assert main([first, *rest]) == 0
    said = capsys.readouterr().out
    assert said
    for line in shown(command.block):
        assert line in said


def shown(block: Block) -> list[str]:
    """The first line of what a page shows right after a block of one command."""
    here = [command for command in COMMANDS if command.block == block]
    end = block.line + block.text.count('\n') + 1
    return [
        other.text.splitlines()[0]
        for other in blocks(block.page)
        if len(here) == 1 and other.language == 'text' and other.line in (end, end + 2)
    ]


PYTHON = [
    block for page in PAGES for block in blocks(page) if block.language == 'python'
]
CONFIGS = [block for block in PYTHON if is_config(block.text)]
PROGRAMS = [block for block in PYTHON if block not in CONFIGS]


@pytest.mark.parametrize('block', CONFIGS, ids=str)
def test_config(block, folder):
    """It can be read, its backbone be built, and its optimizer too; a whole one is
    checked as `convnext-mm train` does."""
    (folder / 'configs').symlink_to(ROOT / 'configs')
    (folder / 'my_config.py').write_text(block.text)
    cfg = Config.fromfile('my_config.py')
    assert len(cfg)
    if '_base_' in block.text:
        check_config(cfg, 'train')
    whole = nn.Module()
    settings = cfg.get('model', cfg).get('backbone')
    if settings and 'type' in settings:
        whole.backbone = MODELS.build(settings)
        neck = cfg.get('model', {}).get('neck') or {}
        channels = [*whole.backbone.out_channels]
        assert neck.get('in_channels', channels) == channels
    optim = cfg.get('optim_wrapper', {})
    if 'constructor' in optim:
        if not hasattr(whole, 'backbone'):
            whole.backbone = ConvNeXt(ARCH)
        constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(
                type=optim.constructor,
                optim_wrapper_cfg=dict(
                    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4)
                ),
                paramwise_cfg=optim.get('paramwise_cfg'),
            )
        )
        assert len(constructor(whole).param_groups) > 1


@pytest.fixture(scope='module')
def work_folder(tmp_path_factory) -> Path:
    """Of a run that has not trained."""
    folder = tmp_path_factory.mktemp('run')
    cfg = Config.fromfile(ROOT / SHAPES)
    cfg.dump(folder / 'config.py')
    state = build_model(cfg, 'cpu').state_dict()
    torch.save(dict(state_dict=state), folder / 'iter_1.pth')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('page', sorted({block.page for block in PROGRAMS}))
def test_program(page, folder, work_folder):
    """The programs of a page, one after the other."""
    Image.new('RGB', (64, 48)).save('photo.jpg')
    namespace = {}
    for block in PROGRAMS:
        if block.page == page:
            # A network of the zoo, by an untrained one.
            text = block.text.replace("'mask-rcnn_convnext-t'", repr(str(work_folder)))
            exec(compile(text, str(block), 'exec'), namespace)


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    for path, anchor in links(page):
        # The site makes one page of the notebook.
        path = path.replace('tutorial.md', 'tutorial.ipynb')
        assert (ROOT / path).exists(), f'{page}: there is no {path}'
        if anchor and path.endswith('.md'):
            assert anchor in anchors(path), f'{page}: {path} has no {anchor}'


def test_languages():
    """A block says what it is; those of no language cannot be run."""
    known = {*SHELL, 'python', 'text', 'mermaid', 'json'}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in known, f'{block}: {block.language!r}'
