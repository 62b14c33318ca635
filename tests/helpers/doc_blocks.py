"""The code blocks, commands and links of the documents."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from repo import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md'))
)
# Also those inside a tab of the site, which are indented.
FENCE = re.compile(r'^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
SHELL = ('bash', 'console', 'sh', 'shell')
# Programs that come before what they run.
BEFORE = ('.venv/bin/', 'python -m ', 'python ', 'bash ')
GROUPS = ('convnext-mm show',)  # whose next word is a command, too


class Block(NamedTuple):
    """A fenced block. ``line`` is that of its first line, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f'{self.page}:{self.line}'


class Command(NamedTuple):
    """One of a shell: its environment variables, program and arguments."""

    block: Block
    words: tuple[str, ...]
    variables: dict[str, str]

    @property
    def head(self) -> str:
        """What names it: the program, or the program and its first word."""
        text = ' '.join(self.words)
        for before in BEFORE:
            text = text.removeprefix(before)
        first, *rest = text.split(' ')
        if first.endswith(('.py', '.sh')) or first in ('pytest', 'build'):
            return first
        head = ' '.join([first, *rest[:1]]) if self.words[0] != 'python' else first
        return ' '.join([first, *rest[:2]]) if head in GROUPS else head

    @property
    def options(self) -> set[str]:
        return {word.partition('=')[0] for word in self.words if word.startswith('--')}

    def __str__(self) -> str:
        return f'{self.block}: {shlex.join(self.words)}'


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    return [
        Block(
            page,
            text.count('\n', 0, found.start(3)) + 1,
            found[2],
            re.sub(rf'^{found[1]}', '', found[3], flags=re.MULTILINE),
        )
        for found in FENCE.finditer(text)
    ]


def prose(page: str) -> str:
    """A page without its blocks."""
    return FENCE.sub('', (ROOT / page).read_text())


def commands(block: Block) -> Iterator[Command]:
    """Those of a block of a shell; of one of ``console``, what follows ``$``."""
    text = block.text.replace('\\\n', ' ')
    lines = text.splitlines()
    if block.language == 'console':
        lines = [line[2:] for line in lines if line.startswith('$ ')]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars='&|;<>')
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ';']:
            if set(word) <= set('&|;'):
                if words:
                    yield _command(block, words)
                words = []
            else:
                words.append(word)


def _command(block: Block, words: list[str]) -> Command:
    variables = {}
    while re.match(r'[A-Z_]+=', words[0]):
        name, _, variables[name] = words.pop(0).partition('=')
    if '>' in words:
        words = words[: words.index('>')]
    return Command(block, tuple(words), variables)


def all_commands() -> list[Command]:
    return [
        command
        for page in PAGES
        for block in blocks(page)
        if block.language in SHELL
        for command in commands(block)
    ]


def is_config(source: str) -> bool:
    """Whether Python is a config of MMEngine: assignments of what ``dict`` makes."""
    tree = ast.parse(source)
    if any(isinstance(node, ast.With) for node in tree.body):
        return 'read_base' in source
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return all(isinstance(node, ast.Assign) for node in tree.body) and all(
        isinstance(call, ast.Name) and call.id == 'dict' for call in calls
    )


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as GitHub and the site name them."""
    found: set[str] = set()
    for heading in re.findall(r'^#+ (.+)$', prose(page), re.MULTILINE):
        named = re.search(r'\{ *#([\w-]+) *\}', heading)
        bare = re.sub(r'[`*]|\]\([^)]*\)|\[', '', heading).strip().lower()
        slug = re.sub(r'[^\w\- ]', '', bare).replace(' ', '-')
        found.add(named[1] if named else slug)
    return found


def links(page: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of each link into the repository, the path from its root."""
    folder = Path(page).parent
    for target in re.findall(r'\]\(<?([^)\s>]+)', prose(page)):
        if re.match(r'[a-z]+:', target):
            continue
        path, _, anchor = target.partition('#')
        full = (ROOT / folder / path).resolve() if path else ROOT / page
        yield str(full.relative_to(ROOT)), anchor
