"""What commands share: how they end, and options that several have."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class Command(click.Command):
    """A command that needs the whole package: imports it, and ends with one
    sentence whatever goes wrong. Options that are ``multiple`` also take several
    values at once, as in OpenMMLab's tools: ``--cfg-options a=1 b=2``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name
            for param in self.params
            if isinstance(param, click.Option) and param.multiple
            for name in param.opts
        }
        ctx.meta['arguments'] = list(_without_gpus(args))
        return super().parse_args(ctx, list(_one_by_one(args, several)))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            import convnext_mm.public  # noqa: F401, registers
        except ImportError as error:
            from convnext_mm.engine.errors import TROUBLESHOOTING

            raise SystemExit(
                f'error: {error} (`convnext-mm doctor` examines this environment)\n'
                f'More: {TROUBLESHOOTING}#missing-package'
            ) from None
        from convnext_mm.apis.config import short_errors

        with short_errors():
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                # `| head` has seen enough. What is still in Python's own buffer
                # must go somewhere when it ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0


def _one_by_one(args: list[str], several: set[str]) -> Iterator[str]:
    """``-o a b`` as ``-o a -o b``, for the options in ``several``."""
    option, is_first = None, False
    for position, arg in enumerate(args):
        if arg == '--':
            yield from args[position:]
            return
        if arg.startswith('-') and len(arg) > 1:
            option, is_first = (arg, True) if arg in several else (None, False)
        elif option and not is_first:
            yield option
        else:
            is_first = False
        yield arg


def _without_gpus(args: list[str]) -> Iterator[str]:
    rest = iter(args)
    for arg in rest:
        if arg == '--gpus':
            next(rest, None)
        elif not arg.startswith('--gpus='):
            yield arg


class Setting(click.ParamType):
    """``key=value``, as MMEngine's ``DictAction`` reads it."""

    name = 'KEY=VALUE'

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if '=' not in value.strip('='):
            self.fail(f'{value!r} is not KEY=VALUE', param, ctx)
        return value


def settings_of(ctx: click.Context, param: click.Parameter, values: tuple) -> Any:
    """The last of ``--cfg-options``, dotted names to values."""
    if not values:
        return None
    # What MMEngine offers for it is an action of argparse.
    import argparse

    from mmengine.config import DictAction

    parser = argparse.ArgumentParser()
    parser.add_argument('--options', nargs='+', action=DictAction)
    try:
        return parser.parse_args(['--options', *values]).options
    except Exception as error:
        raise click.BadParameter(f'{" ".join(values)}: {error}') from None


def _set_local_rank(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value is not None:
        os.environ.setdefault('LOCAL_RANK', str(value))


def complete_model(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of trained models, or else files."""
    from convnext_mm.apis.zoo import models

    trained = (model for model in models() if model.weights)
    return _matching(trained, incomplete)


def complete_config(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of recipes, or else files."""
    from convnext_mm.apis.zoo import models

    return _matching(models(), incomplete)


def _matching(models: Iterable[Any], incomplete: str) -> list[CompletionItem]:
    names = [
        CompletionItem(name)
        for model in models
        for name in (*model.aliases, model.name)
        if name.startswith(incomplete)
    ]
    # A shell takes either.
    return names or [CompletionItem(incomplete, type='file')]


def config_options(command: Callable) -> Callable:
    """Those of :func:`convnext_mm.apis.config.load_config`."""
    for option in reversed(
        (
            click.option(
                '--work-dir',
                metavar='DIR',
                help='Folder for logs, checkpoints and metrics.  '
                '[default: work_dirs/CONFIG_NAME]',
            ),
            click.option(
                '--cfg-options',
                multiple=True,
                type=Setting(),
                callback=settings_of,
                help='Settings to override, one or several: '
                'train_dataloader.batch_size=4 key="[(1,2),(3,4)]" (no spaces inside '
                'a value).',
            ),
            click.option(
                '--data-root',
                metavar='DIR',
                help="Where the data is, instead of the config's data_root.",
            ),
            click.option(
                '--launcher',
                type=click.Choice(LAUNCHERS),
                default='none',
                help='Job launcher that started this process.',
            ),
            # torchrun sets LOCAL_RANK itself; the older launcher passes an argument.
            click.option(
                '--local_rank',
                '--local-rank',
                type=int,
                hidden=True,
                expose_value=False,
                callback=_set_local_rank,
            ),
        )
    ):
        command = option(command)
    return command


gpus_option = click.option(
    '--gpus',
    type=click.IntRange(1),
    metavar='N',
    help='Start N processes, one for each GPU (or on the CPU): what '
    'tools/dist_*.sh do, with the same environment variables.',
)


def launch(ctx: click.Context, gpus: int) -> int:
    """Starts the command of ``ctx`` again, in ``gpus`` processes.

    Returns:
        The launcher's exit status.
    """
    from convnext_mm.engine import launcher

    os.environ['GPUS'] = str(gpus)
    command = ['-m', 'convnext_mm', str(ctx.info_name), *ctx.meta['arguments']]
    return launcher.main([*command, '--launcher', 'pytorch'])
