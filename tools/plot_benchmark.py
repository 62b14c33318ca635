"""Draws result files of tools/benchmark.py: one panel of bars for each file,
mode, dtype and quantity; times with quartiles, the floor as a dashed line.

    python tools/plot_benchmark.py benchmarks/*.json --out benchmarks/plot.png
"""

import argparse

from convnext_mm.apis.benchmark.plot import plot


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument('results', nargs='+', metavar='FILE.json')
    parser.add_argument('--out', required=True, metavar='FILE.png')
    args = parser.parse_args(argv)
    try:
        plot(args.results, args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    main()
