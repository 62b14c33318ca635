"""Test sets of ImageNet's classes in folders, and their metrics: ImageNet-A, -R and
-Sketch, and the corrupted ImageNet-C and ImageNet-C-bar."""

import difflib
import io
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from rich.console import Console
from rich.table import Table

from convnext_mm.registry import DATASETS, METRICS, register

from .errors import DataError, short

WNIDS = Path(__file__).with_name('imagenet_wnids.txt')
SUBSETS = ('all', 'a', 'r')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
SEVERITIES = (1, 2, 3, 4, 5)
# Error of AlexNet, the mean over the five severities: the normalisation of
# ImageNet-C (arXiv 1903.12261; the figures of its authors' evaluation, as AugMix,
# arXiv 1912.02781, has them in its code).
ALEXNET_ERRORS = dict(
    gaussian_noise=0.886428,
    shot_noise=0.894468,
    impulse_noise=0.922640,
    defocus_blur=0.819880,
    glass_blur=0.826268,
    motion_blur=0.785948,
    zoom_blur=0.798360,
    snow=0.866816,
    frost=0.826572,
    fog=0.819324,
    brightness=0.564592,
    contrast=0.853204,
    elastic_transform=0.646056,
    pixelate=0.717840,
    jpeg_compression=0.606500,
)
CORRUPTIONS = {
    'c': tuple(ALEXNET_ERRORS),
    # As the folders of the published archive are called (arXiv 2102.11273).
    'c-bar': (
        'blue_noise_sample',
        'brownish_noise',
        'caustic_refraction',
        'checkerboard_cutout',
        'cocentric_sine_waves',
        'inverse_sparkles',
        'perlin_noise',
        'plasma_noise',
        'single_frequency_greyscale',
        'sparkles',
    ),
}


@cache
def _labels() -> dict[str, tuple[int, list[str]]]:
    """WordNet id to label, and the subsets that have the class."""
    lines = (
        line.split()
        for line in WNIDS.read_text().splitlines()
        if not line.startswith('#')
    )
    return {wnid: (label, sets) for label, (wnid, *sets) in enumerate(lines)}


def class_labels(classes: str | Sequence[str]) -> dict[str, int]:
    """WordNet ids to labels of ImageNet-1K, 0 to 999, ascending.

    Args:
        classes: ``'all'`` 1000, the 200 of ImageNet-A (``'a'``) or ImageNet-R
            (``'r'``), or WordNet ids.

    Raises:
        DataError: There is no such set or class.
    """
    known = _labels()
    if isinstance(classes, str):
        if classes not in SUBSETS:
            raise DataError(
                f'classes={classes!r} is none of {SUBSETS}, and no list of WordNet ids'
            )
        return {
            wnid: label
            for wnid, (label, sets) in known.items()
            if classes in ('all', *sets)
        }
    unknown = [wnid for wnid in classes if wnid not in known]
    if unknown or not classes:
        raise DataError(
            f'classes has {short(unknown)}: ImageNet-1K has WordNet ids such as '
            f'{next(iter(known))!r}; give some of its 1000, or one of {SUBSETS}'
        )
    return {wnid: known[wnid][0] for wnid in sorted(classes)}


def _folders(parent: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except OSError as error:
        raise DataError(
            f'{parent!r} cannot be listed ({error.strerror}): unpack the data there, '
            'or say where it is with --data-root DIR'
        ) from error


def _samples(parent: str, labels: dict[str, int], **more: Any) -> list[dict]:
    """Images of the class folders in a folder, in the order of their names.

    Raises:
        DataError: A class folder is missing, empty, or of no class.
    """
    found = _folders(parent)
    strange = [name for name in found if name not in _labels()]
    if strange:
        raise DataError(
            f'{parent!r} has {len(strange)} folders that are no classes of ImageNet, '
            f'{short(strange, 3)}: class folders are WordNet ids, such as '
            f'{next(iter(labels))!r}; take the others away, or correct data_root'
        )
    missing = [wnid for wnid in labels if wnid not in set(found)]
    if missing:
        raise DataError(
            f'{parent!r} lacks {len(missing)} of {len(labels)} class folders, the '
            f'first is {missing[0]!r}: unpack the data there, or say where it is with '
            '--data-root DIR'
        )
    samples, empty = [], []
    for wnid, label in labels.items():
        folder = os.path.join(parent, wnid)
        names = [n for n in os.listdir(folder) if n.lower().endswith(SUFFIXES)]
        if not names:
            empty.append(wnid)
        samples += [
            dict(img_path=os.path.join(folder, name), gt_label=label, **more)
            for name in sorted(names)
        ]
    if empty:
        raise DataError(
            f'{parent!r} has {len(empty)} class folders without an image, the first is '
            f'{empty[0]!r} (images end in {", ".join(SUFFIXES)}): unpack the data '
            'again'
        )
    return samples


class _OfImageNet(BaseDataset):
    """Its labels are those of ImageNet-1K, whichever classes there are."""

    def __init__(self, classes: str | Sequence[str] = 'all', **kwargs: Any) -> None:
        self.labels = class_labels(classes)
        metainfo = dict(classes=tuple(_labels()))
        # Folders are looked at after it is built: a registry would put words of its
        # own before what is wrong with them.
        kwargs = {'lazy_init': True, 'test_mode': True, **kwargs}
        super().__init__(metainfo=metainfo, **kwargs)


@register(DATASETS)
class ImageNetFolders(_OfImageNet):
    """``data_root/WNID/*``, for testing. A sample has ``img_path`` and ``gt_label``,
    an int in [0, 1000).

    Args:
        classes: Of :func:`class_labels`; the folders of all must be there. Others of
            ImageNet-1K are left out.
        **kwargs: Of MMEngine's ``BaseDataset``: ``data_root``, ``pipeline``.

    Raises:
        DataError: A folder is missing, empty, or of no class.
    """

    def load_data_list(self) -> list[dict]:
        return _samples(self.data_root, self.labels)


@register(DATASETS)
class ImageNetCorrupted(_OfImageNet):
    """``data_root/CORRUPTION/SEVERITY/WNID/*``, the layout of ImageNet-C and
    ImageNet-C-bar, for testing. A sample has ``img_path``, ``gt_label``, an int in
    [0, 1000), ``corruption`` and ``severity``.

    Args:
        corruptions: ``'c'`` for the 15 of ImageNet-C that its mCE is over (the four
            extra ones are left out), ``'c-bar'`` for the 10 of ImageNet-C-bar, or
            names of folders.
        severities: Of 1 to 5.
        classes: Of :func:`class_labels`.
        **kwargs: Of MMEngine's ``BaseDataset``: ``data_root``, ``pipeline``.

    Raises:
        DataError: A folder is missing, empty, or of no class.
    """

    def __init__(
        self,
        corruptions: str | Sequence[str] = 'c',
        severities: Sequence[int] = SEVERITIES,
        **kwargs: Any,
    ) -> None:
        if isinstance(corruptions, str):
            if corruptions not in CORRUPTIONS:
                raise DataError(
                    f'corruptions={corruptions!r} is none of {tuple(CORRUPTIONS)}, '
                    'and no list of folders'
                )
            corruptions = CORRUPTIONS[corruptions]
        self.corruptions, self.severities = tuple(corruptions), tuple(severities)
        strange: list[Any] = [s for s in self.severities if s not in SEVERITIES]
        strange += [c for c in self.corruptions if not isinstance(c, str)]
        if strange or not self.corruptions or not self.severities:
            raise DataError(
                f'severities={self.severities} of {self.corruptions}: give one or '
                f'several of {SEVERITIES}, and at least one corruption by its name'
            )
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        found = _folders(self.data_root)
        missing = [name for name in self.corruptions if name not in found]
        if missing:
            # ImageNet-C's archives are called after groups of corruptions.
            inside = next(
                (f for f in found if missing[0] in _folders(f'{self.data_root}/{f}')),
                None,
            )
            raise DataError(
                f'{self.data_root!r} lacks {len(missing)} of {len(self.corruptions)} '
                f'corruptions, {short(missing, len(self.corruptions))}; it has '
                f'{short(found)}: '
                + (
                    f'move {missing[0]!r} and its like there out of {inside!r}'
                    if inside
                    else _close(missing[0], found) + 'unpack the archives that have '
                    'them, or name others with test_dataloader.dataset.corruptions'
                )
            )
        lacking = {
            name: absent
            for name in self.corruptions
            if (
                absent := [
                    s
                    for s in self.severities
                    if str(s) not in _folders(f'{self.data_root}/{name}')
                ]
            )
        }
        if lacking:
            listed = ', '.join(f'{name} {short(s)}' for name, s in lacking.items())
            raise DataError(
                f'{self.data_root!r} lacks severities: {listed}: unpack the data again'
            )
        return [
            sample
            for name in self.corruptions
            for severity in self.severities
            for sample in _samples(
                os.path.join(self.data_root, name, str(severity)),
                self.labels,
                corruption=name,
                severity=severity,
            )
        ]


def _close(name: str, found: list[str]) -> str:
    close = difflib.get_close_matches(name, found, 1)
    return f'is {close[0]!r} meant to be {name!r}? ' if close else ''


def _best(scores: Any, labels: np.ndarray) -> int:
    """The label of the highest score among some."""
    return int(labels[int(scores[labels].argmax())])


@register(METRICS)
class SubsetAccuracy(BaseMetric):
    """``accuracy/top1`` in percent, of predictions among some classes of ImageNet-1K
    only: how ImageNet-A and ImageNet-R are evaluated.

    Args:
        classes: Of :func:`class_labels`.
        **kwargs: Of MMEngine's ``BaseMetric``.
    """

    default_prefix = 'accuracy'

    def __init__(self, classes: str | Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.labels = np.array(list(class_labels(classes).values()))

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """
        Args:
            data_batch: Not used.
            data_samples: With ``pred_score``, (1000,) float, and ``gt_label``, (1,)
                int.
        """
        self.results += [
            _best(sample['pred_score'], self.labels) == int(sample['gt_label'])
            for sample in data_samples
        ]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return dict(top1=100 * float(np.mean(results)))


@register(METRICS)
class CorruptionError(BaseMetric):
    """Top-1 errors in percent over corruptions and severities, as a table in the log
    and as metrics: ``corruption/NAME`` is the mean over severities,
    ``corruption/mean_error`` that over corruptions. ``corruption/mCE`` is the mean of
    their quotients by AlexNet's errors (arXiv 1903.12261), if they are the 15 of
    ImageNet-C with five severities each. Which there are the samples say.
    """

    default_prefix = 'corruption'

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """
        Args:
            data_batch: Not used.
            data_samples: With ``pred_score``, (1000,) float, ``gt_label``, (1,) int,
                ``corruption`` and ``severity``.
        """
        self.results += [
            (
                sample['corruption'],
                sample['severity'],
                int(sample['pred_score'].argmax()) != int(sample['gt_label']),
            )
            for sample in data_samples
        ]

    def compute_metrics(self, results: list[tuple[str, int, bool]]) -> dict[str, float]:
        counts: dict[str, dict[int, list[int]]] = {}  # of images, and of wrong ones
        for name, severity, is_wrong in results:
            count = counts.setdefault(name, {}).setdefault(severity, [0, 0])
            count[0] += 1
            count[1] += is_wrong
        errors = {
            name: {s: 100 * wrong / total for s, (total, wrong) in sorted(of.items())}
            for name, of in counts.items()
        }
        means = {name: float(np.mean([*of.values()])) for name, of in errors.items()}
        summary = dict(mean_error=float(np.mean([*means.values()])))
        if means.keys() == ALEXNET_ERRORS.keys() and all(
            tuple(of) == SEVERITIES for of in errors.values()
        ):
            summary['mCE'] = float(
                np.mean([mean / ALEXNET_ERRORS[name] for name, mean in means.items()])
            )
        print_log('\n' + _table(errors, means, summary), logger='current')
        return {**means, **summary}


def _table(
    errors: dict[str, dict[int, float]],
    means: dict[str, float],
    summary: dict[str, float],
) -> str:
    severities = sorted({s for of in errors.values() for s in of})
    table = Table(title='Top-1 error in %, by severity')
    table.add_column('corruption')
    for head in (*map(str, severities), 'mean'):
        table.add_column(head, justify='right')
    for name, of in errors.items():
        cells = [f'{of[s]:.1f}' if s in of else '' for s in severities]
        table.add_row(name, *cells, f'{means[name]:.1f}')
    table.add_section()
    for name, value in summary.items():
        table.add_row(name, *[''] * len(severities), f'{value:.1f}')
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue()
