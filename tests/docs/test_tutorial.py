"""The tutorial runs from its first cell to its last, and what is stored of a run of
it is clean."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from convnext_mm.apis.config_check import check_config
from repo import ROOT
from warm_python import warm_python

NOTEBOOK = ROOT / 'docs' / 'tutorial.ipynb'
# In place of the numbers of the cell with this tag.
PARAMETERS = 'parameters'
TINY = dict(train_images=4, val_images=2, iterations=6, batch_size=1, threshold=0.0)
ABSOLUTE = re.compile(r'(?<![\w~./:-])/(?!dev/shm)[A-Za-z_][\w.-]*/')


class Notebook:
    """Runs the cells of a notebook in this process, and their lines that begin with
    ``!`` in a shell, in the current folder."""

    def __init__(self, cells: list[dict], folder: Path) -> None:
        self.cells, self.namespace = cells, {}
        self.printed: dict[str, str] = {}  # by commands, as they were run
        self.shown: list = []  # values of last expressions
        # The programs start from a Python that has imported PyTorch already.
        (folder / 'python').write_text(f'#!/bin/sh\nexec {warm_python()} "$@"\n')
        (folder / 'convnext-mm').write_text(
            f'#!/bin/sh\nexec {warm_python()} -m convnext_mm "$@"\n'
        )
        for program in folder.iterdir():
            program.chmod(0o755)
        path = [str(folder), str(Path(sys.executable).parent), os.environ['PATH']]
        self.environ = {**os.environ, 'PATH': os.pathsep.join(path)}
        self.environ.update(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')

    def run(self, **parameters: object) -> None:
        for cell in self.cells:
            source = ''.join(cell['source'])
            self.run_cell(source)
            if PARAMETERS in cell['metadata'].get('tags', ()):
                assert parameters.keys() <= self.namespace.keys()
                self.namespace.update(parameters)

    def run_cell(self, source: str) -> None:
        self.namespace['_shell'] = self.shell
        source = re.sub(
            r'(?m)^!((?:.*\\\n)*.+)$', lambda m: f'_shell({m[1]!r})', source
        )
        *body, last = ast.parse(source).body
        if not isinstance(last, ast.Expr):
            body, last = [*body, last], None
        exec(compile(ast.Module(body, []), '<cell>', 'exec'), self.namespace)
        if last:
            value = eval(
                compile(ast.Expression(last.value), '<cell>', 'eval'), self.namespace
            )
            self.shown += [] if value is None else [value]

    def shell(self, command: str) -> None:
        command = eval(f'f{command!r}', self.namespace)
        done = subprocess.run(
            command,
            shell=True,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f'{command}:\n{done.stdout[-6000:]}'
        self.printed[command] = done.stdout


@pytest.fixture(scope='module')
def cells() -> list[dict]:
    content = json.loads(NOTEBOOK.read_text())
    return [cell for cell in content['cells'] if cell['cell_type'] == 'code']


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The empty one in which the notebook runs."""
    folder = tmp_path / 'empty'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def notebook(cells, tmp_path, folder) -> Notebook:
    programs = tmp_path / 'programs'
    programs.mkdir()
    return Notebook(cells, programs)


@pytest.mark.slow
def test_runs(notebook, folder, capsys):
    notebook.run(**TINY)

    def printed(beginning: str) -> str:
        (text,) = [v for k, v in notebook.printed.items() if k.startswith(beginning)]
        return text

    assert 'no problem found' in printed('convnext-mm doctor')
    assert 'total' in printed('convnext-mm flops')
    assert 'output norms' in printed('convnext-mm show backbone')
    # Stopped halfway, and gone on from there.
    first, second = (
        text for c, text in notebook.printed.items() if c.startswith('convnext-mm tra')
    )
    assert re.search(r'Iter\(train\) +\[3/3\]', first)
    assert 'iter: 3' in second
    assert re.search(r'Iter\(train\) +\[6/6\]', second)
    assert re.search(r'starts +│ +2 ', printed('convnext-mm show run'))
    for text in (first, second, printed('convnext-mm test')):
        for name in ('bbox_mAP', 'bbox_mAP_50', 'segm_mAP', 'segm_mAP_50'):
            assert f'coco/{name}:' in text
    assert (folder / 'work_dirs' / 'my_shapes' / 'iter_6.pth').is_file()

    # Data, learning rate, curves, and ground truth beside what was found.
    assert len(notebook.shown) == 4
    assert all(isinstance(picture, Image.Image) for picture in notebook.shown)
    assert notebook.shown[-1].width == 2 * notebook.shown[-1].height
    names = ['00000.png', '00001.png']
    categories = 'circle triangle square star cross'.split()
    for found in (folder / 'found').iterdir():
        assert sorted(p.name for p in (found / 'pictures').iterdir()) == names
        content = json.loads((found / 'predictions.json').read_text())
        assert [category['name'] for category in content['categories']] == categories
        assert len(content['images']) == 2
    assert {p.name for p in (folder / 'found').iterdir()} == {'python', 'terminal'}
    result = notebook.namespace['result']
    assert len(result) == result.pictures == 2
    said = capsys.readouterr().out
    assert 'images:      4 such as' in said
    assert '2 pictures; found: ' in said
    assert f'2 images, {len(content["annotations"])} objects' in said
    # Nothing else is left there, as the notebook says.
    assert {p.name for p in folder.iterdir()} == {
        *('data', 'seen', 'work_dirs', 'found', 'my_shapes.py')
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    'base',
    [
        'custom/own-coco-data_mask-rcnn_convnext-t',
        'demo/mask-rcnn_convnext-atto_coco-tiny',
    ],
)
def test_other_bases(notebook, folder, base):
    """The config with another base, as the notebook says to change it."""
    for cell in notebook.cells:
        source = ''.join(cell['source'])
        if 'my_shapes.py' in source and 'write' in source:
            break
        if PARAMETERS in cell['metadata'].get('tags', ()):
            notebook.run_cell(source)
    notebook.run_cell(source)
    text = (folder / 'my_shapes.py').read_text()
    text = text.replace('demo/mask-rcnn_convnext-atto_shapes-520it', base)
    text = text[: text.index('max_iters')] + 'train_cfg = dict(max_epochs=12)\n'
    (folder / 'my_shapes.py').write_text(text)
    cfg = Config.fromfile('my_shapes.py')
    check_config(cfg, 'train')
    assert 'Resize' in str(cfg.train_dataloader.dataset.pipeline)
    assert cfg.model.roi_head.mask_head.num_classes == 5
    assert cfg.train_cfg.type == 'EpochBasedTrainLoop'
    for split, name in dict(train='training', val='validation').items():
        data = cfg[f'{split}_dataloader'].dataset
        assert data.data_root == 'data/tutorial/'
        assert data.ann_file == f'annotations/instances_{name}.json'
        assert data.data_prefix.img == f'images/{name}/'
    assert cfg.val_evaluator.ann_file == data.data_root + data.ann_file


@pytest.mark.parametrize('source', ['!exit 3', 'x = 1\nx / 0', '!convnext-mm trai'])
def test_broken_cells_fail(notebook, source):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        notebook.run_cell(source)


def test_stored(cells):
    """All cells were executed, in order, without an error, and say nothing of the
    machine that they ran on."""
    assert [cell['execution_count'] for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert cell['metadata'].keys() <= {'tags'}
        for output in cell['outputs']:
            assert output['output_type'] in ('stream', 'execute_result')
            text = output.get('text') or output['data']['text/plain']
            text = ''.join(text)
            assert not ABSOLUTE.findall(text), text
            assert 'Warning' not in text and 'Traceback' not in text
        if ''.join(cell['source']).startswith('!'):
            assert cell['outputs'], cell['source']
    content = json.loads(NOTEBOOK.read_text())
    assert content['metadata']['kernelspec']['name'] == 'python3'
    assert NOTEBOOK.stat().st_size < 700_000
