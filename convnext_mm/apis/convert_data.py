"""Bringing a data set into COCO's format."""

import os
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track

from convnext_mm.datasets.conversion import (
    Findings,
    Mistake,
    Picture,
    Source,
    check_classes,
    coco_file,
    write_json,
)
from convnext_mm.datasets.convert_voc import find_annotations, open_voc
from convnext_mm.datasets.convert_yolo import find_yaml, open_yolo
from convnext_mm.datasets.errors import DataError, short
from convnext_mm.engine.errors import ConfigError

MISTAKES_SHOWN = 20
REPEATED = 'pictures are listed more than once in their split, and are kept once'
SHARED = 'pictures are in train and in val, and what val says is no forecast'


class Split(NamedTuple):
    """What was written of a split.

    Attributes:
        file: The annotation file.
        pictures, empty: Pictures, and those of them without objects.
        objects, with_mask: Objects, and those of them with a mask.
        by_class: Class to number of objects.
    """

    file: Path
    pictures: int
    empty: int
    objects: int
    with_mask: int
    by_class: Counter[str]


class Report(NamedTuple):
    """
    Attributes:
        kind: The format that was read.
        classes: In the order of their ids.
        splits: Name to what was written.
        findings: What was left out, and what is worth a word.
        in_place: Pictures lie where they lay, and annotations name them from DST.
    """

    kind: str
    classes: list[str]
    splits: dict[str, Split]
    findings: Findings
    in_place: bool


def convert_data(
    source: Path,
    target: Path,
    kind: str | None = None,
    classes: tuple[str, ...] = (),
    held_out: int = 20,
    in_place: bool = False,
    masks: bool = False,
    first_pixel: int | None = None,
    skip_mistakes: bool = False,
) -> Report:
    """Reads a data set, and writes ``train.json``, ``val.json``, ... and a folder of
    links to the pictures for each, as ``configs/custom/own-*.py`` expect them.

    Args:
        source: Folder of the data set, or YOLO's yaml file.
        target: Folder to write; it must not hold the same files yet.
        kind: ``'voc'`` or ``'yolo'``; by default what lies in ``source``.
        classes: Of Pascal VOC, in the order of their ids, by default those that are
            met; YOLO's yaml file has its own.
        held_out: Percent of the training pictures that become the validation's,
            where the data set names none.
        in_place: Make no links.
        masks, first_pixel: Of :func:`convnext_mm.datasets.convert_voc.open_voc`.
        skip_mistakes: Leave out what is wrong, instead of writing nothing.

    Raises:
        DataError: The data set cannot be read, or has mistakes; the first of them are
            named with their file, line and value.
        ConfigError: The arguments contradict each other, or ``target`` is in use.
    """
    findings = Findings()
    opened = _open(source, kind, findings, classes, masks, first_pixel)
    _compare_lists(opened, findings)
    if 'val' not in opened.splits and held_out:
        _hold_out(opened, held_out, findings)
    for split in opened.splits:
        for path in (target / f'{split}.json', target / split):
            if path.exists() or path.is_symlink():
                raise ConfigError(
                    f'{str(path)!r} exists: name a new folder as DST, or delete it'
                )
    pictures = {
        split: _read(opened, split, paths, findings)
        for split, paths in opened.splits.items()
    }
    names = _classes(opened, pictures, findings)
    findings.drop_repeats()
    _refuse(findings, skip_mistakes)
    return Report(
        opened.kind,
        names,
        {
            split: _write(split, found, names, target, in_place)
            for split, found in pictures.items()
        },
        findings,
        in_place,
    )


def _open(
    source: Path,
    kind: str | None,
    findings: Findings,
    classes: tuple[str, ...],
    masks: bool,
    first_pixel: int | None,
) -> Source:
    if not source.exists():
        raise DataError(
            f'{str(source)!r} does not exist: give the folder of a data set'
        )
    is_voc, is_yolo = find_annotations(source), find_yaml(source)
    if kind is None:
        if is_voc and is_yolo:
            raise ConfigError(
                f'{str(source)!r} holds {is_voc} of Pascal VOC and {is_yolo} of YOLO: '
                'say which with --from'
            )
        if not is_voc and not is_yolo:
            raise DataError(
                f'{str(source)!r} is no data set that is known: Pascal VOC has a '
                'folder Annotations with xml files, YOLO a data.yaml with names'
            )
        kind = 'voc' if is_voc else 'yolo'
    if kind == 'voc':
        opened = open_voc(source, findings, masks, first_pixel)
        if classes:
            opened.classes = check_classes(list(classes), '--classes')
        return opened
    given = [
        option
        for option, value in (
            ('--classes', classes),
            ('--masks', masks),
            ('--first-pixel', first_pixel is not None),
        )
        if value
    ]
    if given:
        raise ConfigError(
            f'{", ".join(given)} is for Pascal VOC: a data.yaml of YOLO has the names, '
            'and polygons become masks by themselves'
        )
    return open_yolo(source, findings)


def _compare_lists(source: Source, findings: Findings) -> None:
    """Drops what a split lists again; a note on what two of them share."""
    files: dict[str, dict[str, Path]] = {}
    for split, paths in source.splits.items():
        once = files[split] = {}
        for path in paths:
            file = os.path.realpath(path)
            if file in once:
                findings.notes[REPEATED].append(str(path))
            else:
                once[file] = path
        source.splits[split] = list(once.values())
    shared = files['train'].keys() & files.get('val', {}).keys()
    if shared:
        findings.notes[SHARED] += sorted(str(files['train'][file]) for file in shared)


def _hold_out(source: Source, percent: int, findings: Findings) -> None:
    """Makes validation pictures of some for training, the same every time."""
    train = source.splits['train']
    number = max(1, round(len(train) * percent / 100))
    if number >= len(train):
        raise DataError(
            f'{source.folder}: with {number} of {len(train)} held out for validation '
            'no picture is left to train on: add pictures, or hold none out '
            '(--held-out 0)'
        )
    held_out = set(random.Random(0).sample(train, number))
    source.splits['train'] = [path for path in train if path not in held_out]
    source.splits['val'] = [path for path in train if path in held_out]
    findings.notes[
        'pictures are held out for validation, since the data set names none'
    ] += map(str, source.splits['val'])


def _read(
    source: Source, split: str, paths: list[Path], findings: Findings
) -> list[Picture]:
    pictures = []
    console = Console(stderr=True)
    for path in track(
        paths,
        f'Reading {split}',
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        try:
            pictures.append(source.read(path))
        except Mistake as mistake:
            findings.mistakes.append(str(mistake))
    if not pictures:
        raise DataError(
            f'none of the pictures of {split} ({len(paths)}) can be used; the first: '
            f'{findings.mistakes[-len(paths)]}; correct that, or list other pictures '
            f'for {split}'
        )
    return pictures


def _classes(
    source: Source, pictures: dict[str, list[Picture]], findings: Findings
) -> list[str]:
    """Of the data set; objects of others are mistakes, and are taken out."""
    everything = [picture for found in pictures.values() for picture in found]
    met = {item.label for picture in everything for item in picture.objects}
    if not met:
        raise DataError(
            f'{source.folder}: no object of the pictures ({len(everything)}) can be '
            'used' + ''.join(f'; {mistake}' for mistake in findings.mistakes[:3])
        )
    if source.classes is None:
        return sorted(met)
    for picture in everything:
        unknown = [i.label for i in picture.objects if i.label not in source.classes]
        if unknown:
            findings.mistakes.append(
                f'{picture.path}: objects of {short(sorted(set(unknown)))}, which is '
                f'not among the classes {short(source.classes)}: add it to --classes'
            )
            picture.objects[:] = [
                item for item in picture.objects if item.label in source.classes
            ]
    return source.classes


def _refuse(findings: Findings, skip_mistakes: bool) -> None:
    mistakes = findings.mistakes
    if mistakes and not skip_mistakes:
        more = len(mistakes) - MISTAKES_SHOWN
        what = '1 mistake' if len(mistakes) == 1 else f'{len(mistakes)} mistakes'
        raise DataError(
            '\n'.join(
                [
                    f'{what}, and nothing is written; correct what is wrong, or leave '
                    'it out with --skip-mistakes:',
                    *mistakes[:MISTAKES_SHOWN],
                    *[f'... and {more} more'] * (more > 0),
                ]
            )
        )


def _write(
    split: str,
    pictures: list[Picture],
    classes: list[str],
    target: Path,
    in_place: bool,
) -> Split:
    # Pictures in several folders may have one name.
    shared = os.path.commonpath([os.path.abspath(p.path.parent) for p in pictures])
    start = target if in_place else shared
    named = [(os.path.relpath(picture.path, start), picture) for picture in pictures]
    file = target / f'{split}.json'
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not in_place:
            for name, picture in named:
                link = target / split / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(
                    os.path.relpath(picture.path.resolve(), link.parent.resolve())
                )
    except OSError as error:
        raise DataError(
            f'{target} cannot be written ({error}): name another DST'
            + ', or make no links (--in-place)' * (not in_place)
        ) from error
    write_json(coco_file(named, classes), file)
    objects = [item for picture in pictures for item in picture.objects]
    return Split(
        file,
        len(pictures),
        sum(not picture.objects for picture in pictures),
        len(objects),
        sum(item.segmentation is not None for item in objects),
        Counter(item.label for item in objects),
    )
