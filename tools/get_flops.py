"""Prints parameters and FLOPs of a config's model, part by part, counted as in
the ConvNeXt papers: multiply-accumulates for one image; a two-stage detector
sends 1000 proposals through every box head and 100 through every mask head; an
auxiliary head counts in parameters only."""

import argparse

from rich.console import Console
from rich.table import Table

from convnext_mm.analysis.complexity import Cost, default_shape, measure, total
from convnext_mm.apis.config import load_config


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        metavar=('H', 'W'),
        help='size of the image (default: 800 1280 for a detector, the test '
        'scale for a segmentor, the test crop for a classifier)',
    )
    return parser.parse_args(argv)


def print_table(title: str, costs) -> None:
    table = Table(title=title)
    table.add_column('part')
    table.add_column('parameters (M)', justify='right')
    table.add_column('FLOPs (G)', justify='right')

    def add_row(name: str, cost: Cost, **style) -> None:
        table.add_row(
            name, f'{cost.params / 1e6:.1f}', f'{cost.flops / 1e9:.1f}', **style
        )

    for name, cost in costs.items():
        if cost != (0, 0):
            add_row(name, cost)
    table.add_section()
    add_row('total', total(costs), style='bold')
    Console().print(table)


def main(argv=None) -> None:
    args = parse_args(argv)
    try:
        cfg = load_config(args.config)
        shape = tuple(args.shape or default_shape(cfg))
        costs = measure(cfg, shape)
    except ValueError as error:
        raise SystemExit(f'error: {error}') from None
    print_table(f'{args.config}, one image of {shape[0]} x {shape[1]}', costs)


if __name__ == '__main__':
    main()
