"""Writes docs/model_zoo.md from model-index.yml and the metafiles it imports;
with --check only says whether the page is current (status 1 if not)."""

import argparse
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'model_zoo.md'
INTRODUCTION = """\
# Model zoo

Made by `python tools/maintenance/make_model_zoo.py` from the metafiles in
`configs/`: change those, not this page.

Results marked *paper* are the papers' own, *mmdet* and *mmseg* MMDetection's and
MMSegmentation's; results marked *ours* are runs of this project. Weights are those
that the figures were published with, by the name that `convnext-mm infer` and
`convnext-mm test` take: the paper's authors released theirs under the MIT licence,
MMDetection and MMSegmentation under Apache-2.0. They are fetched once, checked, and
must fit their model completely; where no network is, the message says which file to
put where. Each recipe fetches its initial weights itself. Parameters (M) and FLOPs
(G, multiply-accumulates for one image) are counted by `convnext-mm flops`, the
paper's figure in brackets.

Settings: *published* means that every value is the paper's; *published sets,
our choice from them* that the paper says what it swept but not what won; *our
choice* that nothing is published. Each config says more.
"""
SECTIONS = {
    'mask_rcnn': 'COCO, Mask R-CNN',
    'cascade': 'COCO, Cascade Mask R-CNN',
    'rtmdet': 'COCO, RTMDet',
    'upernet': 'ADE20K, UPerNet',
    'imagenet': 'ImageNet classification, MMPretrain',
    'isotropic': 'Isotropic ConvNeXt',
    'roadmap': 'From ResNet to ConvNeXt',
    'robustness': 'ImageNet classification, robustness',
    'demo': 'Small runs',
}
NOTES = {
    'roadmap': 'Each config is any of the seventeen steps of its regime: '
    '[roadmap](roadmap.md).',
    'robustness': 'Trained on ImageNet-1K, tested on ImageNet-C (mCE), ImageNet-C-bar '
    '(mean error), ImageNet-A, -R and -Sketch: [robustness](robustness.md). Of the '
    'settings of the test on ImageNet-C and -C-bar the paper says nothing.',
    'upernet': 'Test one scale with a sliding window by default, several '
    'scales (and flips, V1) with `convnext-mm test MODEL --tta`. V2: '
    'the paper gives several scales only.',
}
# Metric in the metafiles to the head of its column.
COLUMNS = {
    'box AP': 'box AP',
    'mask AP': 'mask AP',
    'mIoU': 'mIoU',
    'mIoU(ms)': 'mIoU, scales',
    'mIoU(ms+flip)': 'mIoU, scales + flips',
    'Top 1 Accuracy': 'top 1',
    'mCE': 'mCE',
    'Mean Error': 'mean error',
}


def read_models(index: Path) -> dict[str, list[dict]]:
    """Models by the folder of their config, in the order of the index."""
    folders: dict[str, list[dict]] = {}
    for name in yaml.safe_load(index.read_text())['Import']:
        for model in yaml.safe_load((ROOT / name).read_text())['Models']:
            folders.setdefault(Path(model['Config']).parent.name, []).append(model)
    return folders


def with_paper(value: float, scale: float, paper) -> str:
    text = f'{value / scale:.1f}'
    return text if paper is None else f'{text} ({paper})'


def metrics_of(model: dict) -> dict[str, str]:
    """Head of column to result, with whose it is."""
    found: dict[str, list[str]] = {}
    for result in model.get('Results', ()):
        for metric, value in result['Metrics'].items():
            name, _, whose = metric.rpartition(' (')
            head = COLUMNS.get(name, name)
            found.setdefault(head, []).append(f'{value} {whose[:-1]}')
    return {head: ', '.join(values) for head, values in found.items()}


def weights_of(model: dict) -> str:
    """Their shortest name, with their address."""
    if 'Weights' not in model:
        return ''
    name = min((model['Name'], *model.get('Alias', ())), key=len)
    return f'[`{name}`]({model["Weights"]})'


def table(models: list[dict]) -> str:
    known = {head for model in models for head in metrics_of(model)}
    heads = [head for head in COLUMNS.values() if head in known]
    heads += sorted(known - set(heads))
    rows = [
        'recipe, weights, initial weights, settings, parameters, FLOPs, at'.split(', ')
        + heads
    ]
    for model in models:
        meta, metrics = model['Metadata'], metrics_of(model)
        rows.append(
            [
                f'[{model["Name"]}](../{model["Config"]})',
                weights_of(model),
                meta.get('Initial Weights', 'none'),
                meta['Settings'],
                with_paper(
                    meta['Parameters'], 1e6, meta.get('Parameters in M (paper)')
                ),
                with_paper(meta['FLOPs'], 1e9, meta.get('FLOPs in G (paper)')),
                meta['FLOPs Input'],
                *(metrics.get(head, '') for head in heads),
            ]
        )
    rows.insert(1, ['---'] * len(rows[0]))
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)


def make_page() -> str:
    parts = [INTRODUCTION]
    for folder, models in read_models(ROOT / 'model-index.yml').items():
        parts.append(f'## {SECTIONS.get(folder, folder)}\n')
        if folder in NOTES:
            parts.append(NOTES[folder] + '\n')
        parts.append(table(models) + '\n')
    return '\n'.join(parts)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing')
    args = parser.parse_args(argv)
    page = make_page()
    if args.check:
        current = PAGE.is_file() and PAGE.read_text() == page
        if not current:
            print(
                f'{PAGE.relative_to(ROOT)} is not current: run python '
                'tools/maintenance/make_model_zoo.py'
            )
        return 0 if current else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
