"""Recipes and trained models."""

import json
from typing import Any

import click

from convnext_mm.archs import ARCHS, ISOTROPIC_ARCHS, REGIMES

from .options import Command

ARCHS_OF_ALL = (*ARCHS, *(f'isotropic {arch}' for arch in ISOTROPIC_ARCHS), *REGIMES)
TASKS = ('detection', 'instance', 'semantic', 'classification')


@click.command(
    cls=Command,
    epilog="""\b
Examples:
  convnext-mm zoo --trained
  convnext-mm zoo --task semantic --arch base
  convnext-mm zoo mask-rcnn_convnext-t
  convnext-mm zoo --trained --json""",
)
@click.argument('name', required=False)
@click.option('--trained', is_flag=True, help='Only those with trained weights.')
@click.option('--task', type=click.Choice(TASKS), help='What they find.')
@click.option('--arch', type=click.Choice(ARCHS_OF_ALL), help='Of the backbone.')
@click.option(
    '--pretraining', metavar='TEXT', help='Part of the name, such as 22k, fcmae, clip.'
)
@click.option('--cached', is_flag=True, help='Only those whose weights are fetched.')
@click.option('--json', 'as_json', is_flag=True, help='As json.')
def command(name: str | None, as_json: bool, **filters: Any) -> None:
    """List recipes and trained models; or all that is known of one, by NAME. A
    trained model's shortest name is shown: `infer` and `test` take it."""
    from convnext_mm.apis import zoo
    from convnext_mm.engine.errors import ConfigError

    if name is not None:
        if any(filters.values()):
            raise ConfigError(f'give a name, {name}, or filters')
        model = zoo.find(name)
        if model is None:
            close = zoo.close_names(name)
            raise ConfigError(
                f'the zoo has no {name!r}'
                + (f': did you mean {" or ".join(close)}?' if close else '')
            )
        found = [model]
    else:
        found = [m for m in zoo.models() if _is_wanted(m, **filters)]
    if as_json:
        click.echo(json.dumps([zoo.as_dict(m) for m in found], indent=1))
    elif name is not None:
        _print_one(found[0])
    elif found:
        _print_table(found)
    else:
        raise ConfigError('the zoo has nothing like that: leave a filter out')


def _is_wanted(
    model: Any,
    trained: bool,
    task: str | None,
    arch: str | None,
    pretraining: str | None,
    cached: bool,
) -> bool:
    return (
        (not trained or model.weights is not None)
        and (task is None or task in model.tasks)
        and (arch is None or arch == model.arch)
        and (pretraining is None or pretraining.lower() in _squeezed(model))
        and (not cached or model.cached is not None)
    )


def _squeezed(model: Any) -> str:
    return f'{model.pretraining} {model.name}'.lower()


def _print_table(models: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column('name', no_wrap=True)
    table.add_column('published', overflow='fold')
    table.add_column('weights', no_wrap=True)
    for model in models:
        state = 'fetched' if model.cached else 'by name' if model.weights else 'recipe'
        figures = ', '.join(
            f'{value} {name.partition(" (")[0]}'
            for name, value in model.metrics.items()
        )
        table.add_row(model.shortest, figures, state)
    # In a pipe each is one line, to be searched.
    console = Console()
    console.print(table, crop=False) if console.is_terminal else Console(
        width=200
    ).print(table)
    trained = sum(m.weights is not None for m in models)
    click.echo(f'{len(models)} recipes, {trained} with trained weights')


def _print_one(model: Any) -> None:
    rows = {
        'name': model.name,
        'also': ', '.join(model.aliases),
        'config': model.config,
        'tasks': ', '.join(model.tasks),
        'arch': model.arch,
        **model.metadata,
        **model.metrics,
        'weights': model.weights or 'none published',
        'fetched': model.cached or 'no',
    }
    for name, value in rows.items():
        if name in ('Parameters', 'FLOPs'):
            value = f'{value / 1e6:,.1f} million'
        click.echo(f'{name:24} {value}')
