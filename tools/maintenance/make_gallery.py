"""Makes the pictures of docs/gallery.md, docs/layer_decay.md and docs/memory.md, with
the commands that the gallery names, on drawn shapes and the demos' models; with
--measure counts anew what a block keeps, into benchmarks/memory_kept.json."""

import argparse
import functools
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

import layer_decay_plot
import memory_kept

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / 'docs' / 'images'
MEASURED = ROOT / 'benchmarks' / 'memory_kept.json'
LARGEST = 250_000  # bytes of a picture
WIDTH = 1200  # pixels, at most
SPACE = 8  # pixels between two tiles
QUALITIES = (1, 0.9, 0.8, 0.7)  # of the colours of a palette, or the best JPEG
NEEDED = {
    'data/shapes': 'python -m convnext_mm.datasets data/shapes',
    'work_dirs/demo': 'make demo',
    'work_dirs/demo-seg': 'make demo-seg',
}
HELD_OUT = 'data/shapes/images/validation'
SEGMENTOR = 'upernet_convnext-atto_shapes'
TRAINED = '--checkpoint work_dirs/demo-seg/iter_1600.pth'
OWN_SHAPES = (
    '--data-root data/shapes/ --cfg-options '
    'train_dataloader.dataset.ann_file=annotations/instances_training.json '
    'train_dataloader.dataset.data_prefix.img=images/training/'
)


class Picture(NamedTuple):
    """A picture that commands of the package make.

    Attributes:
        commands: Run in the repository's root; each writes below its ``--out``.
        made: Pattern of the files that each writes there.
        columns: Of the tiles that these files become.
    """

    commands: Sequence[str]
    made: str
    columns: int = 1


COMMANDS = {
    'detections.jpg': Picture(
        [f'convnext-mm infer work_dirs/demo {HELD_OUT} --limit 6 --score 0.5'],
        'pictures/*.png',
        columns=3,
    ),
    'segmentations.jpg': Picture(
        [
            f'convnext-mm infer work_dirs/demo-seg {HELD_OUT} --limit 4 '
            '--ground-truth data/shapes/annotations/validation'
        ],
        'pictures/*.png',
        columns=2,
    ),
    'feature_maps.jpg': Picture(
        [
            f'convnext-mm show backbone {SEGMENTOR} {TRAINED} --shape 384 384 '
            f'--image {HELD_OUT}/00001.png'
        ],
        'features_*.png',
    ),
    'receptive_fields.jpg': Picture(
        [
            f'convnext-mm show backbone {SEGMENTOR} --erf --shape 384 384',
            f'convnext-mm show backbone {SEGMENTOR} --erf --shape 384 384 {TRAINED}',
        ],
        'receptive_fields.png',
    ),
    'learning_rates.png': Picture(
        [
            'convnext-mm show lr '
            'cascade-mask-rcnn_convnext-t_fpn_4conv1fc-giou_8xb2-amp-ms-crop-3x_coco'
        ],
        'learning_rate.png',
    ),
    'augmentations.jpg': Picture(
        [
            'convnext-mm show data own-coco-data_mask-rcnn_convnext-t --count 4 '
            + OWN_SHAPES
        ],
        'data_train/*.png',
        columns=2,
    ),
    'run.png': Picture(['convnext-mm show run work_dirs/demo-seg'], 'runs.png'),
    'roadmap_counted.png': Picture(
        ['convnext-mm show roadmap --no-measure --no-detector'], 'roadmap_*.png'
    ),
}


def run_commands(picture: Picture, target: Path) -> Path:
    """Runs a picture's commands, and makes one picture of what they write.

    Raises:
        SystemExit: Data or a demo's model is missing, or a command failed.
    """
    for path, how in NEEDED.items():
        # work_dirs/demo is not work_dirs/demo-seg.
        is_named = re.search(rf'{path}(?![\w-])', ' '.join(picture.commands))
        if is_named and not (ROOT / path).exists():
            raise SystemExit(f'error: {path} is missing: make it with `{how}`')
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, command in enumerate(picture.commands):
            out = Path(folder, str(number))
            words = [*shlex.split(command)[1:], '--out', str(out)]
            done = subprocess.run(
                [sys.executable, '-m', 'convnext_mm', *words], cwd=ROOT
            )
            if done.returncode:
                raise SystemExit(f'error: `{command}` failed, see above')
            found += sorted(out.glob(picture.made))
        return write(
            [Image.open(path).convert('RGB') for path in found], target, picture.columns
        )


def write(tiles: Sequence[Image.Image], target: Path, columns: int = 1) -> Path:
    """Writes tiles in rows, no wider than :data:`WIDTH`, as well as
    :data:`LARGEST` bytes allow.

    Args:
        tiles: RGB; they get one width.
        target: PNG, with a palette, or JPEG to write.
        columns: Tiles of a row.

    Raises:
        SystemExit: It is too large at the lowest quality.
    """
    width = (WIDTH - SPACE * (columns - 1)) // columns
    width = min(width, max(tile.width for tile in tiles))
    tiles = [
        ImageOps.contain(tile, (width, 2 * WIDTH), Image.LANCZOS) for tile in tiles
    ]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    size = ((width + SPACE) * columns - SPACE, sum(heights) + SPACE * (len(rows) - 1))
    whole = Image.new('RGB', size, 'white')
    top = 0
    for row, height in zip(rows, heights):
        for number, tile in enumerate(row):
            whole.paste(tile, (number * (width + SPACE), top))
        top += height + SPACE
    target.parent.mkdir(parents=True, exist_ok=True)
    for quality in QUALITIES:
        if target.suffix == '.png':
            whole.quantize(round(256 * quality)).save(target, optimize=True)
        else:
            whole.save(target, quality=round(92 * quality), optimize=True)
        if target.stat().st_size <= LARGEST:
            return target
    target.unlink()
    raise SystemExit(f'error: {target} has more than {LARGEST} bytes')


def draw(how: Callable[[Path], Path], target: Path) -> Path:
    """The same of a picture that a function draws."""
    with tempfile.TemporaryDirectory() as folder:
        return write(
            [Image.open(how(Path(folder, 'drawn.png'))).convert('RGB')], target
        )


def makers() -> dict[str, Callable[[Path], Path]]:
    """File of each picture to what writes it to a path."""

    def kept(how: Callable, target: Path) -> Path:
        result = json.loads(MEASURED.read_text())
        return draw(functools.partial(how, result), target)

    return {
        **{name: functools.partial(run_commands, p) for name, p in COMMANDS.items()},
        'layer_decay.png': functools.partial(draw, layer_decay_plot.draw),
        'memory_block.png': functools.partial(kept, memory_kept.draw_block),
        'memory_backbone.png': functools.partial(kept, memory_kept.draw_backbone),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--only', nargs='+', choices=[Path(name).stem for name in makers()]
    )
    parser.add_argument('--out', type=Path, default=IMAGES, metavar='DIR')
    parser.add_argument('--measure', action='store_true')
    args = parser.parse_args(argv)
    if args.measure:
        MEASURED.write_text(json.dumps(memory_kept.measure(), indent=1) + '\n')
    for name, make in makers().items():
        if not args.only or Path(name).stem in args.only:
            path = make(args.out / name)
            print(f'{path}: {path.stat().st_size / 1000:.0f} kB')


if __name__ == '__main__':
    main()
