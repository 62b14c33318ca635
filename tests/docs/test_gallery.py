"""The gallery's pictures, and the script that makes them."""

import json
import re

import pytest
import torch
from PIL import Image

import layer_decay_plot
import make_gallery
import memory_kept
from convnext_mm import ConvNeXt
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.apis.config import load_config
from repo import ROOT

DOCS = ROOT / 'docs'
PAGES = [DOCS / f'{name}.md' for name in ('gallery', 'layer_decay', 'memory')]
MEASURED = json.loads(make_gallery.MEASURED.read_text())
RECIPE = re.compile(r'\| `(\S+)` \| (\w+) \| (\S+) \| (\d+) \| (\S+) \|')


def pictures_of(page):
    return set(re.findall(r'!\[[^]]+\]\((images/[^)]+)\)', page.read_text()))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_pictures_of_a_page_can_be_read(page):
    assert pictures_of(page)
    for picture in pictures_of(page):
        with Image.open(DOCS / picture) as image:
            image.load()
            assert image.width >= 600, picture
            assert len(image.convert('RGB').getcolors(2**24)) > 8, picture


def test_every_picture_is_small_and_in_a_page():
    shown = set().union(*map(pictures_of, PAGES))
    made = [f'images/{name}' for name in make_gallery.makers()]
    assert set(made) <= shown
    for picture in made:
        with Image.open(DOCS / picture) as image:
            assert image.width <= 1200, picture
    sizes = [(DOCS / picture).stat().st_size for picture in made]
    assert max(sizes) <= make_gallery.LARGEST
    assert sum(sizes) < 2_000_000


def test_the_page_names_the_commands():
    page = (DOCS / 'gallery.md').read_text()
    for picture in make_gallery.COMMANDS.values():
        for command in picture.commands:
            assert f'\n{command}\n' in page


def test_missing_models_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make_gallery, 'ROOT', tmp_path)
    (tmp_path / 'data/shapes').mkdir(parents=True)
    (tmp_path / 'work_dirs/demo').mkdir(parents=True)
    with pytest.raises(SystemExit, match=r'demo-seg is missing.*`make demo-seg`'):
        make_gallery.main(['--only', 'run', '--out', str(tmp_path)])


def test_tiles(tmp_path):
    tiles = [Image.new('RGB', (40, 20), c) for c in ('red', 'green', 'blue')]
    with Image.open(make_gallery.write(tiles, tmp_path / 'x.png', 2)) as image:
        assert image.size == (40 * 2 + 8, 20 * 2 + 8)
        pixels = image.convert('RGB')
    corners = (0, 0), (87, 0), (0, 47), (87, 47)
    colours = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)
    assert tuple(map(pixels.getpixel, corners)) == colours


@pytest.mark.slow
@pytest.mark.parametrize('title', layer_decay_plot.PANELS)
def test_layer_decay_factors(title):
    """Rates of the built optimizers follow the published rule."""
    for recipe in layer_decay_plot.PANELS[title].values():
        cfg = load_config(recipe)
        rule = cfg.optim_wrapper.paramwise_cfg
        found = layer_decay_plot.factors(cfg)
        full = rule.num_layers + 1
        first, *_, last = found
        assert (first, last) == (('stem', None), (layer_decay_plot.AFTER, None))
        ids = {
            ('stem', None): 0,
            ('stage 1', 2): 1,
            ('downsampling 3', None): 3,
            ('stage 3', 3): 3,
            ('stage 3', 4): 4,
            ('stage 4', 1): rule.num_layers,
            (layer_decay_plot.AFTER, None): full,
        }
        if rule.decay_type == 'stage_wise':
            ids.update(
                {('downsampling 3', None): 0, ('stage 3', 4): 3, ('stage 4', 1): 4}
            )
        for place, layer_id in ids.items():
            expected = rule.decay_rate ** (full - layer_id)
            assert found[place] == pytest.approx(expected, rel=1e-9), (recipe, place)


def test_layer_decay_table():
    rows = RECIPE.findall((DOCS / 'layer_decay.md').read_text())
    assert len(rows) >= 10
    for recipe, decay_type, rate, num_layers, lr in rows:
        settings = load_config(recipe).optim_wrapper
        rule = settings.paramwise_cfg
        assert rule.get('decay_type', 'layer_wise') == decay_type, recipe
        assert (rule.decay_rate, rule.num_layers) == (float(rate), int(num_layers))
        assert settings.optimizer.lr == float(lr), recipe


@pytest.mark.slow
def test_layer_decay_plot(tmp_path, monkeypatch):
    (title, recipes), *_ = layer_decay_plot.PANELS.items()
    monkeypatch.setattr(
        layer_decay_plot, 'PANELS', {title: recipes, f'{title} again': recipes}
    )
    make_gallery.main(['--only', 'layer_decay', '--out', str(tmp_path)])
    with Image.open(tmp_path / 'layer_decay.png') as image:
        assert image.width == 946


def rows_by_way(rows):
    return {(row['way'], row['dtype']): row['bytes'] for row in rows}


@pytest.mark.slow
def test_memory_is_that_of_the_result():
    """Measured again, small: what is kept for a pixel depends on no size, but for the
    weights' copies."""
    small = memory_kept.measure((1, 96, 8, 8), 'atto', (1, 3, 64, 64))
    found, stored = rows_by_way(small['block']), rows_by_way(MEASURED['block'])
    assert found.keys() == stored.keys()
    for way, kept in found.items():
        weights = kept.pop('weights in bf16', 0)
        assert kept == pytest.approx(
            {k: v for k, v in stored[way].items() if k != 'weights in bf16'}
        )
        assert (weights > 0) == (way == ('eager', 'bf16 autocast'))
    for dtype in memory_kept.DTYPES:
        eager, lean, plus, again = (
            sum(found[way, dtype].values()) for way in memory_kept.WAYS
        )
        assert eager > 2 * lean > 2 * plus >= 2 * again
    assert [row['recomputed_flops'] for row in small['block'][:4]] == [
        *(0, 0),
        *(8 * 96, small['forward_flops']),
    ]
    # Of the backbone, the sum is that of the meter.
    network = ConvNeXt('atto', out_indices=(0, 1, 2, 3), impl='lean').train()
    kept = saved_bytes(lambda: network(torch.zeros(1, 3, 64, 64)), network)
    whole = rows_by_way(small['backbone'])['lean', 'fp32']
    assert sum(whole.values()) == kept


def test_memory_equals_the_benchmark():
    """The picture of the backbone has the figures of the README and docs."""
    text = (ROOT / 'benchmarks/saved_tiny_2x256x256.json').read_text()
    names = {'fp32': 'fp32', 'bf16 autocast': 'amp'}
    benchmark = {
        (row['network'], row['dtype']): row['saved_bytes']
        for row in json.loads(text)['rows']
    }
    for (way, dtype), kept in rows_by_way(MEASURED['backbone']).items():
        if way in ('eager', 'lean', 'lean+'):
            expected = benchmark[way, names[dtype]]
            assert sum(kept.values()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('name', ['memory_block', 'memory_backbone'])
def test_memory_pictures(tmp_path, name):
    make_gallery.main(['--only', name, '--out', str(tmp_path)])
    with Image.open(tmp_path / f'{name}.png') as image:
        assert image.width == 946
