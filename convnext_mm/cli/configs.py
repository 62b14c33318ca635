"""The configs, to read and change."""

import click


@click.command(
    epilog="""\b
Examples:
  convnext-mm configs
  convnext-mm configs --copy my_configs"""
)
@click.option('--copy', metavar='DIR', help='Copy all configs into a new folder.')
def command(copy: str | None) -> None:
    """Say where the configs are, or copy them. A config of your own needs no copy: it
    inherits with _base_ = 'THAT_FOLDER/mask_rcnn/NAME.py'."""
    import shutil

    from convnext_mm.apis.zoo import configs_folder
    from convnext_mm.engine.errors import last_lines

    if copy is None:
        click.echo(configs_folder())
        return
    try:
        shutil.copytree(
            configs_folder(), copy, ignore=shutil.ignore_patterns('__pycache__')
        )
    except FileExistsError as error:
        raise SystemExit(
            last_lines(error, f'{copy} exists: name a new folder')
        ) from None
    except OSError as error:
        raise SystemExit(
            last_lines(error, f'{copy} cannot be written: {error}')
        ) from None
    click.echo(f'copied to {copy}')
