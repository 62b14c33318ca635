"""What MkDocs calls as it builds the site: brings in pages that lie outside of docs/,
leads links to where their targets are, and draws the diagram. Nothing is fetched."""

import base64
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository, and the pages that they become.
PAGES = {
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'docs/tutorial.ipynb': 'tutorial.md',
}
ORIGINS = {page: file for file, page in PAGES.items()}
# Whose tables need the room of the navigation at the left.
WIDE = ('model_zoo.md', 'recipes.md')
# Of pictures that pages show and that lie outside of docs/.
OUTSIDE = 'outside'
PICTURES = ('.png', '.jpg', '.svg')
# Code in which nothing is a link, or a link or picture.
LINK = re.compile(
    r'(?P<code>^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$|(?P<ticks>`+).+?(?P=ticks))'
    r'|(?P<mark>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s]+)\)',
    re.DOTALL | re.MULTILINE,
)
MERMAID = re.compile(r'^```mermaid\n(.*?)^```$', re.DOTALL | re.MULTILINE)
# A reference as Sphinx writes it, in a docstring that became HTML.
ROLE = re.compile(r':[a-z]+:<code>[~.]?')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that lie elsewhere."""
    for name, page in PAGES.items():
        path = ROOT / name
        text = path.read_text()
        if path.suffix == '.ipynb':
            text, pictures = notebook_page(json.loads(text), path)
            for picture, content in pictures.items():
                files.append(File.generated(config, picture, content=content))
        files.append(File.generated(config, page, content=text))
    shown = {
        place
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
        if (place := _outside_picture(file.src_uri, match['target']))
    }
    for place in sorted(shown):
        uri = f'{OUTSIDE}/{place}'
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Draws, and leads links to where their targets are on the site."""
    uri = page.file.src_uri
    if uri in WIDE:
        page.meta['hide'] = ['navigation']
    text = MERMAID.sub(lambda match: draw_floors(match[1]), markdown)
    text = re.sub(r'(?m)^<details>', '<details markdown="1">', text)
    return LINK.sub(lambda match: _link(match, uri), text)


def on_page_content(content: str, **_: Any) -> str:
    """Writes Sphinx's references as plain names."""
    return ROLE.sub('<code>', content)


def _place(uri: str, target: str | None) -> str | None:
    """The file of the repository that a link of a page names, None for an address or
    a heading of the same page."""
    path = (target or '').partition('#')[0]
    if not path or re.match(r'[a-z]+:', path):
        return None
    origin = ORIGINS.get(uri, f'docs/{uri}')
    place = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
    return None if place == origin else place


def _outside_picture(uri: str, target: str | None) -> str | None:
    place = _place(uri, target)
    if place and place.endswith(PICTURES) and not place.startswith('docs/'):
        return place if (ROOT / place).is_file() else None
    return None


def _link(match: re.Match, uri: str) -> str:
    place = _place(uri, match['target'])
    if place is None:
        return match[0]
    picture = _outside_picture(uri, match['target'])
    if place in PAGES:
        there = PAGES[place]
    elif place == 'README.md':
        there = 'index.md'
    elif place.startswith('docs/'):
        there = place.removeprefix('docs/')
    elif picture:
        there = f'{OUTSIDE}/{picture}'
    elif (ROOT / place).exists():
        return as_path(match['text'], place)
    else:
        return match[0]  # which MkDocs will name as broken
    there = posixpath.relpath(there, posixpath.dirname(uri) or '.')
    _, sign, anchor = match['target'].partition('#')
    return f'{match["mark"]}[{match["text"]}]({there}{sign}{anchor})'


def as_path(text: str, place: str) -> str:
    """A file of the repository, which has no public address: its path, behind the
    text of the link, or in a tip where the text is its name."""
    name = text.replace('`', '').strip()
    if name.rstrip('/') in place or Path(place).stem in name:
        return f'`{name}`{{ title="{place}" }}'
    return f'{text} (`{place}`)'


def notebook_page(notebook: dict, path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(source)
            continue
        language = 'bash' if source.startswith('!') else 'python'
        parts.append(f'````{language}\n{source}\n````')
        for output in cell['outputs']:
            data = output.get('data', {})
            kind = next((k for k in data if k.startswith('image/')), None)
            if kind is None:
                text = ''.join(output.get('text') or data['text/plain']).rstrip()
                parts.append(
                    f'```` {{ .text .no-copy .output title="Output" }}\n{text}\n````'
                )
                continue
            suffix = kind.removeprefix('image/')
            name = f'{path.stem}/output-{len(pictures) + 1}.{suffix}'
            pictures[name] = base64.b64decode(''.join(data[kind]))
            parts.append(f'![What the cell above shows]({name})')
    # Below the title.
    note = f'!!! note ""\n    This page is a notebook: [download]({path.name}) it.'
    title, _, rest = '\n\n'.join(parts).partition('\n')
    return f'{title}\n\n{note}\n{rest}\n', pictures


def draw_floors(source: str) -> str:
    """A flowchart of Mermaid, whose arrows all descend, as boxes on floors.

    Raises:
        PluginError: It is none, or has an arrow to its own floor or up.
    """
    first, *lines = filter(None, map(str.strip, source.splitlines()))
    if first != 'flowchart TD':
        raise PluginError(f'site_hooks draws `flowchart TD`, not {first!r}')
    labels = dict(re.findall(r'(\w+)\["(.*?)"\]', source))
    arrows: dict[str, list[str]] = {name: [] for name in labels}
    for line in lines:
        above, arrow, below = re.sub(r'\[".*?"\]', '', line).partition(' --> ')
        if arrow:
            arrows[above] += below.split(' & ')
    floors: list[list[str]] = []
    left = dict(arrows)
    while left:
        reached = {name for below in left.values() for name in below}
        floor = [name for name in left if name not in reached]
        if not floor:
            raise PluginError(f'site_hooks: arrows close a circle in {sorted(left)}')
        floors.append(floor)
        left = {name: below for name, below in left.items() if name not in floor}
    rows = []
    for floor, following in zip(floors, [*floors[1:], []]):
        boxes = ''.join(_box(labels[n], arrows[n], following, labels) for n in floor)
        rows.append(f'<div class="floor">{boxes}</div>')
    return '<div class="floors">' + ''.join(rows) + '</div>'


def _box(label: str, below: list[str], floor: list[str], labels: dict) -> str:
    """A room; those below are named where they are not all of the next floor."""
    arrows = ''
    if set(below) != set(floor):
        names = (re.sub(r'<.*?>', '', labels[n].partition('<br>')[0]) for n in below)
        arrows = f'<br><i>&darr; {html.escape(", ".join(names))}</i>'
    return f'<div class="room">{label}{arrows}</div>'
