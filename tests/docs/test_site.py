"""The documentation's site: it builds without a network, and has every page. What
readers see of it `make docs` checks, in Chromium."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

pytest.importorskip('mkdocs', reason='needs the extra docs')
pytest.importorskip('playwright', reason='needs the extra docs')

from mkdocs.config import load_config
from mkdocs.exceptions import PluginError

import check_site
import convnext_mm
import site_hooks
from repo import ROOT

# Names of the page architecture.md, cut.
CHART = """\
flowchart TD
    a["<b>a/</b><br>first"] --> b
    b["<b>b/</b>"] --> c & d
    c["<b>c/</b><br>third"] --> e
    d["<b>d/</b>"] --> e & f
    e["<b>e</b>"]
    f["<b>f</b>"]
"""
# Any address asked is one too many.
NO_NETWORK = """
import socket, sys
def refuse(*_):
    raise SystemExit('the build asks the network')
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


def nav_pages(entries: list) -> list[str]:
    return [
        page
        for entry in entries
        for value in entry.values()
        for page in (nav_pages(value) if isinstance(value, list) else [value])
    ]


def link(text: str, page: str = 'page.md') -> str:
    return site_hooks.LINK.sub(lambda match: site_hooks._link(match, page), text)


def test_every_page_is_in_the_navigation():
    nav = nav_pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])
    assert len(nav) == len(set(nav))
    pages = {
        path.relative_to(ROOT / 'docs').as_posix()
        for path in (ROOT / 'docs').rglob('*.md')
    }
    assert set(nav) == pages | set(site_hooks.PAGES.values())


def test_the_reference_has_every_public_name():
    text = (ROOT / 'docs' / 'reference.md').read_text()
    shown = {name.rpartition('.')[2] for name in re.findall(r'(?m)^::: (.+)$', text)}
    assert {*convnext_mm.__all__} - shown == {'__version__'}


@pytest.mark.slow
def test_builds_without_a_network(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', NO_NETWORK, 'build', '--strict', '-d', tmp_path / 's'],
        cwd=ROOT,
        env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ('', 'changelog', 'contributing', 'model_zoo', 'reference', 'tutorial'):
        assert (tmp_path / 's' / page / 'index.html').is_file(), page
    reference = (tmp_path / 's' / 'reference' / 'index.html').read_text()
    for name in ('ConvNeXt', 'drop_path_rate', 'LayerDecayOptimWrapperConstructor'):
        assert name in reference
    assert not re.findall(r':[a-z]+:<code>', reference)
    chart = (tmp_path / 's' / 'architecture' / 'index.html').read_text()
    assert 'class="room"' in chart and 'flowchart' not in chart
    # Scripts, styles and fonts are the site's own.
    for path in (tmp_path / 's').rglob('*.html'):
        asked = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="?(\S+)', path.read_text()
        )
        assert not [address for address in asked if '//' in address], path
    index = json.loads((tmp_path / 's/search/search_index.json').read_text())
    assert len(index['docs']) > 100


@pytest.mark.parametrize(
    'text, expected',
    [
        ('[a](data.md#x)', '[a](data.md#x)'),
        ('[a](#x)', '[a](#x)'),
        ('[a](https://b.c/d.md)', '[a](https://b.c/d.md)'),
        ('[a](../README.md#requirements)', '[a](index.md#requirements)'),
        ('[a](../CONTRIBUTING.md)', '[a](contributing.md)'),
        ('[a](tutorial.ipynb)', '[a](tutorial.md)'),
        ('[a](../nothing/there.py)', '[a](../nothing/there.py)'),
        (
            '[configs/custom](../configs/custom)',
            '`configs/custom`{ title="configs/custom" }',
        ),
        ('[the\nset-up](../tools/setup_env.py)', 'the\nset-up (`tools/setup_env.py`)'),
        ('![a](../benchmarks/cpu_tiny.png)', '![a](outside/benchmarks/cpu_tiny.png)'),
        ('`[a](../CHANGELOG.md)`', '`[a](../CHANGELOG.md)`'),
        ('```\n[a](../CHANGELOG.md)\n```', '```\n[a](../CHANGELOG.md)\n```'),
        ('[0, 1) and [a](../CHANGELOG.md)', '[0, 1) and [a](changelog.md)'),
    ],
)
def test_links_of_a_page(text, expected):
    assert link(text) == expected


def test_links_of_pages_that_lie_elsewhere():
    assert link('[a](docs/data.md#x)', 'contributing.md') == '[a](data.md#x)'
    assert link('[a](CHANGELOG.md)', 'contributing.md') == '[a](changelog.md)'
    assert link('[a](data.md)', 'tutorial.md') == '[a](data.md)'
    assert link('[a](tutorial.ipynb)', 'tutorial.md') == '[a](tutorial.ipynb)'
    assert link('[a](../data.md)', 'more/page.md') == '[a](../data.md)'


def test_notebook():
    cells = [
        dict(cell_type='markdown', source=['# Title\n', '\n', 'Words.']),
        dict(
            cell_type='code',
            source=['!ls {folder}'],
            outputs=[dict(output_type='stream', text=['a ```\n', 'b\n'])],
        ),
        dict(
            cell_type='code',
            source=['x'],
            outputs=[dict(data={'image/png': 'aGk=', 'text/plain': ['<x>']})],
        ),
    ]
    text, pictures = site_hooks.notebook_page(dict(cells=cells), ROOT / 'a' / 'n.ipynb')
    assert text.startswith('# Title\n\n!!! note ""\n    This page is a notebook')
    assert '[download](n.ipynb)' in text and 'Words.' in text
    assert '````bash\n!ls {folder}\n````' in text
    assert '\na ```\nb\n````' in text
    assert pictures == {'n/output-1.png': b'hi'} and '](n/output-1.png)' in text


def test_chart():
    drawn = site_hooks.draw_floors(CHART)
    floors = re.findall(r'<div class="floor">(.*?)</div></div>', drawn + '</div>')
    rooms = [re.findall(r'<b>(\w)', floor) for floor in floors]
    assert rooms == [['a'], ['b'], ['c', 'd'], ['e', 'f']]
    # An arrow is named where it does not lead to the whole next floor.
    assert '&darr; e</i>' in drawn and drawn.count('&darr;') == 1


@pytest.mark.parametrize(
    'source',
    ['graph LR\n a --> b', CHART.replace('e["<b>e</b>"]', 'e["<b>e</b>"] --> a')],
)
def test_other_charts_are_refused(source):
    with pytest.raises(PluginError):
        site_hooks.draw_floors(source)


def test_references_of_docstrings():
    page = '<p>See :func:<code>convnext_mm.infer</code>, :class:<code>.X</code></p>'
    plain = '<p>See <code>convnext_mm.infer</code>, <code>X</code></p>'
    assert site_hooks.on_page_content(page) == plain


def test_the_site_asks_nobody():
    """No font, script or address of another host in the settings."""
    config = load_config(str(ROOT / 'mkdocs.yml'))
    assert config.theme['font'] is False and config.strict
    for setting in ('extra_css', 'extra_javascript'):
        assert config[setting] and '//' not in str(config[setting])
    for path in (ROOT / 'docs' / 'assets').iterdir():
        assert 'https:' not in path.read_text()


def test_check_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='holds no site: `make docs` builds it'):
        check_site.main([str(tmp_path)])
    (tmp_path / 'index.html').touch()
    monkeypatch.setenv('CHROMIUM', 'no-such-browser')
    with pytest.raises(SystemExit, match='no-such-browser is not installed.*apt-get'):
        check_site.main([str(tmp_path)])
