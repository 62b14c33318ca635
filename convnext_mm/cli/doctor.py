"""The state of the environment."""

import json
import shutil
import subprocess
import sys
import textwrap
from itertools import chain

import click

from convnext_mm.apis.doctor import Finding, examine

COLORS = {'ok': 'green', 'note': 'yellow', 'problem': 'red'}
# Of a line: the mark, then the name.
MARK, NAME = 11, 17


@click.command(
    epilog="""\b
Examples:
  convnext-mm doctor
  convnext-mm doctor --fix
  convnext-mm doctor --json > environment.json"""
)
@click.option(
    '--fix',
    is_flag=True,
    help="Do what is safe: put mmcv's operators in, delete old incomplete downloads. "
    'Versions of libraries are never changed.',
)
@click.option('--json', 'as_json', is_flag=True, help='Print JSON, for programs.')
def command(fix: bool, as_json: bool) -> int:
    """Examine this environment: Python, PyTorch, GPUs, OpenMMLab's libraries, what
    runs fast here, the machine and the data; and say what to mend. The exit status is
    1 where there is a problem. Works where the libraries do not."""
    if sys.stderr.isatty():
        click.echo('Examining; this takes some seconds.', err=True)
    groups = examine()
    fixes = [finding.fix for finding in chain(*groups.values()) if finding.fix]
    if fix and not fixes:
        click.echo('fix: there is nothing to do', err=True)
    elif fix:
        for text, run in fixes:
            click.echo(f'fix: {text}', err=True)
            try:
                run()
            except (OSError, subprocess.SubprocessError) as error:
                click.echo(f'not done: {error}', err=True)
        groups = examine()
    problems = [f.name for f in chain(*groups.values()) if f.state == 'problem']
    if as_json:
        click.echo(json.dumps(_plain(groups), indent=2))
    else:
        for group, findings in groups.items():
            click.secho(f'\n{group}', bold=True)
            for finding in findings:
                click.echo(_line(finding))
        count = f'{len(problems)} problem{"s" * (len(problems) > 1)}'
        verdict = f'{count}: {", ".join(problems)}' if problems else 'no problem found'
        click.secho(f'\n{verdict}', bold=True)
    return int(bool(problems))


def _plain(groups: dict[str, list[Finding]]) -> dict[str, list]:
    return {
        'findings': [
            {
                'group': group,
                **finding._asdict(),
                'fix': finding.fix.text if finding.fix else None,
            }
            for group, findings in groups.items()
            for finding in findings
        ]
    }


def _line(finding: Finding) -> str:
    width = min(shutil.get_terminal_size().columns, 110) - 1
    text = _wrapped(f'{finding.name:{NAME}}', finding.message, MARK + NAME, width)
    mark = click.style(f'{finding.state:{MARK - 2}}', fg=COLORS[finding.state])
    lines = f'  {mark}{text}'
    if finding.advice:
        lines += '\n' + ' ' * MARK + _wrapped('-> ', finding.advice, MARK + 3, width)
    return lines


def _wrapped(start: str, text: str, indent: int, width: int) -> str:
    lines = textwrap.wrap(
        text, max(width - indent, 20), break_long_words=False, break_on_hyphens=False
    )
    return start + ('\n' + ' ' * indent).join(lines)
