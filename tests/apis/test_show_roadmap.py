"""`convnext-mm show roadmap`: its facts, counts, measurements and picture."""

import functools
import json
import re
import sys

import cv2
import pytest
import torch

from convnext_mm import ModernizedResNet
from convnext_mm.analysis.meter import saved_bytes
from convnext_mm.apis.show import (
    RoadmapSettings,
    conditions,
    draw_roadmap,
    roadmap,
    walk,
)
from convnext_mm.apis.show.roadmap import Row, count_classifier, count_detector
from convnext_mm.apis.show.roadmap_facts import GROUPS, NOT_KEPT, PEERS, PUBLISHED
from convnext_mm.archs import ROADMAP, STEPS
from convnext_mm.cli import main
from convnext_mm.engine.errors import ConfigError
from repo import ROOT

PAPER = json.loads((ROOT / 'tests/data/paper_tables.json').read_text())['roadmap']
DOCUMENT = ROOT / 'docs/roadmap.md'


def is_picture(path):
    image = cv2.imread(str(path))
    return image is not None and image.std() > 1


@pytest.mark.parametrize('regime', ROADMAP)
def test_facts_are_the_papers(regime):
    assert [
        dict(step=step, top1=p.top1, std=p.std, gflops=p.gflops)
        for step, p in PUBLISHED[regime].items()
    ] == [dict(dict(std=None), **row) for row in PAPER[regime]]
    peer = PEERS[regime]
    key = peer.name.lower().replace('-', '_')
    assert PAPER['compare'][key] == dict(top1=peer.top1, gflops=peer.gflops)


def test_groups_hold_every_step_once():
    assert tuple(step for steps in GROUPS.values() for step in steps) == STEPS
    # A decision is not kept where the next step of the same size is without it.
    last = ROADMAP['resnet50'][STEPS[-1]].kernel_size
    assert [
        step for step, d in ROADMAP['resnet50'].items() if d.kernel_size > last
    ] == [*NOT_KEPT]


def test_names_are_taken_as_they_are_meant():
    settings = RoadmapSettings(
        steps=['Separate-Downsampling', 'relu_to_gelu', 'patchify stem'],
        regime=['ResNet200'],
    )
    assert settings.regime == ['resnet200']
    assert settings.steps == ['patchify stem', 'ReLU to GELU', 'separate downsampling']
    assert RoadmapSettings().steps == [*STEPS]


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(steps=['kernel size 6']), "--steps 'kernel size 6': .* did you mean 'ke"),
        (dict(regime=['resnet5']), "--regime 'resnet5': .* did you mean 'resnet50'"),
        (dict(size=(32, 224)), '--size 32 224: .* at least 64'),
        (dict(batch=0), '--batch 0 must be at least 1'),
        (dict(threads=0), '--threads must be at least 1, not 0'),
        (dict(rounds=1), '--rounds must be at least 2, not 1'),
        (dict(clock='cpu', threads=2), '--clock cpu needs --threads 1'),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(ConfigError, match=message):
        RoadmapSettings(**given)


def test_mistakes_end_with_a_sentence():
    with pytest.raises(SystemExit) as stop:
        main(['show', 'roadmap', '--steps', 'resnet', 'patchify-stm'])
    sentence, _ = str(stop.value).splitlines()
    assert sentence.endswith("did you mean 'patchify stem'?")


def test_steps_of_one_network_are_measured_once(monkeypatch):
    counted = []

    def note(regime, step):
        counted.append(step)
        return count_classifier(regime, step)

    monkeypatch.setattr(roadmap, 'count_classifier', note)
    steps = ['resnet', 'enhanced recipe', 'separate downsampling']
    settings = RoadmapSettings(steps=steps, rounds=2, size=(64, 64), detector=False)
    rows = walk(settings)['resnet50']
    assert counted == ['resnet', 'separate downsampling']
    assert [row.step for row in rows] == steps
    for first, second in zip(rows[0][6:], rows[1][6:]):
        assert first == second
    # The last is ConvNeXt-T (paper: 28.6 M, 4.5 G), the first ResNet-50.
    assert rows[0].params == 25_557_032
    assert (rows[2].params, rows[2].flops) == (28_589_128, 4_455_531_264)
    assert rows[0].is_printed and not rows[2].is_printed
    for row in rows:
        assert row.detector_flops is None
        network = ModernizedResNet('resnet50', row.step).train()
        run = functools.partial(network, torch.rand(1, 3, 64, 64))
        assert row.saved_bytes == saved_bytes(run, network)
        for times in (row.forward, row.train):
            assert len(times['times_ms']) == 2 and min(times['times_ms']) > 0
        assert row.train['median_ms'] > row.forward['median_ms']


@pytest.mark.slow
def test_a_detector_is_that_of_the_config():
    pytest.importorskip('mmdet')
    metafile = (ROOT / 'configs/roadmap/metafile.yml').read_text()
    assert f'FLOPs: {count_detector("resnet50", STEPS[-1])}\n' in metafile
    # Kernels change nothing but the backbone.
    costs = [count_detector('resnet50', f'kernel size {k}') for k in (7, 9)]
    # The convolution of a stage's first block sees the map before it.
    positions = [800 * 1280 // 4 ** (2 + stage) for stage in range(4)]
    taps, widths = 9**2 - 7**2, (96, 192, 384, 768)
    assert costs[1] - costs[0] == sum(
        taps * positions[stage] * ((depth - (stage > 0)) * width + before)
        for stage, (depth, width, before) in enumerate(
            zip((3, 3, 9, 3), widths, (0, *widths))
        )
    )


def test_without_mmdet(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    monkeypatch.setitem(sys.modules, 'mmdet.models', None)
    with pytest.raises(ConfigError, match='--no-detector leaves it out'):
        count_detector('resnet50', 'resnet')


TIMES = dict(median_ms=2.0, quartiles_ms=[1.0, 3.0], times_ms=[1.0, 2.0, 3.0])


@pytest.mark.parametrize('measured', [False, True])
@pytest.mark.parametrize('steps', [1, 17])
def test_picture(measured, steps, tmp_path):
    more = dict(detector_flops=10**11, saved_bytes=10**7, forward=TIMES, train=TIMES)
    group_of = {step: group for group, of_it in GROUPS.items() for step in of_it}
    rows = [
        Row(
            step,
            group_of[step],
            step not in NOT_KEPT,
            p.top1,
            p.std,
            p.gflops,
            10**7,
            4 * 10**9,
            **(more if measured else {}),
        )
        for step, p in list(PUBLISHED['resnet200'].items())[-steps:]
    ]
    path = draw_roadmap('resnet200', rows, tmp_path / 'roadmap.png', 'a machine')
    assert is_picture(path)


def test_command(tmp_path, capsys):
    options = ['--steps', 'BN to LN', 'kernel-size-9', '--no-measure', '--no-detector']
    assert main(['show', 'roadmap', *options, '--out', str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r'BN to LN .* 81\.47 ± 0\.09 .* 4\.46\* .* 4\.15 ', said)
    assert 'kernel size 9 (x)' in said and 'Swin-T has 81.3' in said
    picture = tmp_path / 'roadmap_resnet50.png'
    assert str(picture) in said.replace('\n', '') and is_picture(picture)
    options = ['--steps', 'resnet', '--rounds', '2', '--size', '64', '96', '--json']
    assert main(['show', 'roadmap', *options, '--no-detector', '--clock', 'cpu']) == 0
    facts = json.loads(capsys.readouterr().out)
    (row,) = facts['regimes']['resnet50']['rows']
    assert row['flops'] == 4_089_184_256 and len(row['train']['times_ms']) == 2
    assert facts['command'].startswith('convnext-mm show roadmap --steps resnet')
    assert facts['settings']['size'] == [64, 96] and facts['pictures'] == []
    settings = RoadmapSettings(size=(64, 96), clock='cpu')
    assert '1 image of 64 x 96, fp32' in conditions(settings)


def cells(line):
    return [cell.strip() for cell in line.strip().strip('|').split('|')]


@pytest.mark.slow
@pytest.mark.parametrize('regime', ROADMAP)
def test_the_documents_table(regime):
    """docs/roadmap.md says what the paper does, and what is counted."""
    section = DOCUMENT.read_text().split(f'### {regime}\n')[1].split('\n#')[0]
    rows = {
        line[0]: line[1:]
        for line in map(cells, re.findall(r'^\|.*\|$', section, re.MULTILINE))
        if line[0] in STEPS
    }
    assert [*rows] == [*STEPS]
    measured = json.loads((ROOT / 'benchmarks/roadmap_cpu.json').read_text())
    detectors = {
        row['step']: f'{row["detector_flops"] / 1e9:.1f}'
        for row in measured['regimes'][regime]['rows']
    }
    for step, (top1, printed, counted, params, detector) in rows.items():
        published = PUBLISHED[regime][step]
        std = '' if published.std is None else f' ± {published.std:.2f}'
        assert top1 == f'{published.top1:.2f}{std}'
        assert printed == f'{published.gflops:.2f}'
        own_params, flops = count_classifier(regime, step)
        assert (counted, params) == (f'{flops / 1e9:.2f}', f'{own_params / 1e6:.2f}')
        assert detector == detectors[step]
