"""Completion of commands, options and names in a shell."""

import click
from click.shell_completion import get_completion_class


@click.command(
    epilog="""\b
Examples:
  echo 'eval "$(convnext-mm completion bash)"' >> ~/.bashrc
  convnext-mm completion fish > ~/.config/fish/completions/convnext-mm.fish"""
)
@click.argument('shell', type=click.Choice(['bash', 'zsh', 'fish']))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and names of models."""
    script = get_completion_class(shell)
    if script is None:
        raise click.UsageError(f'click has no completion for {shell}', ctx)
    program = ctx.find_root().command
    name = str(ctx.find_root().info_name)
    variable = f'_{name.replace("-", "_").upper()}_COMPLETE'
    click.echo(script(program, {}, name, variable).source())
