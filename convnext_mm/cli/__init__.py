"""The command line: arguments and calls, nothing else.

Each command has a module of its own, imported when it is called or its own help
is asked for. At its top a module imports click and what has no requirements."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from convnext_mm.version import __version__

PROGRAM = 'convnext-mm'
# In the order of a user's way. What each does is its module's first sentence.
COMMANDS = {
    'doctor': 'Examine this environment, and say what to mend.',
    'demo': 'Train a small detector on drawn shapes and show what it finds.',
    'zoo': 'List recipes and trained models.',
    'infer': 'Find objects, or segment, in pictures and videos.',
    'convert-data': 'Bring Pascal VOC or YOLO annotations into COCO format.',
    'show': 'Draw a backbone, a learning rate, a run, or training data.',
    'train': 'Train the model of a config.',
    'test': 'Evaluate a model on COCO, ADE20K, or your own data.',
    'convert': 'Convert a checkpoint of any family.',
    'export': 'Write a model as ONNX, torch.export or TorchScript.',
    'flops': "Count a model's parameters and FLOPs.",
    'bench': 'Time backbones and models, side by side.',
    'profile': 'Profile a few training steps of a config.',
    'configs': 'Copy the configs, to change them.',
    'completion': 'Print what makes a shell complete commands.',
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return import_module(f'{__name__}.{name.replace("-", "_")}').command

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        with formatter.section('Commands'):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from difflib import get_close_matches

        if args[0] not in COMMANDS and not args[0].startswith('-'):
            close = get_close_matches(args[0], COMMANDS, n=2)
            raise click.UsageError(
                f'there is no command {args[0]!r}'
                + (f': did you mean {" or ".join(close)}?' if close else ''),
                ctx,
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings=dict(help_option_names=['-h', '--help']),
    epilog=f"""\b
Examples:
  {PROGRAM} doctor
  {PROGRAM} zoo --task detection
  {PROGRAM} infer mask-rcnn_convnext-t photo.jpg
  {PROGRAM} train my_config.py --gpus 8
  {PROGRAM} COMMAND --help""",
)
@click.version_option(__version__, prog_name=PROGRAM)
def program() -> None:
    """ConvNeXt for detection and segmentation: released models by name, training,
    evaluation, and what helps with them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Its name and arguments; by default the program's own.

    Returns:
        The exit status: 0, or what the command says.

    Raises:
        SystemExit: With status 2 after a mistake in the arguments, 1 with one
            sentence after any other, 130 after Ctrl-C.
    """
    # A Jupyter of another environment leaves it to the commands that it starts.
    if os.environ.get('MPLBACKEND', '').startswith('module://'):
        os.environ['MPLBACKEND'] = 'agg'
    try:
        status = program.main(
            None if argv is None else list(argv), PROGRAM, standalone_mode=False
        )
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (click.Abort, KeyboardInterrupt):
        print('Stopped.', file=sys.stderr)
        raise SystemExit(130) from None
    return status if isinstance(status, int) else 0
