"""From pictures to objects and masks, with a trained model."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from convnext_mm.datasets.errors import DataError
from convnext_mm.engine.errors import ConfigError

if TYPE_CHECKING:  # they need a head library
    from .prediction import Prediction
    from .predictor import Predictor

__all__ = ['Inference', 'infer']


@dataclass
class Inference:
    """What a run over pictures came to.

    Args:
        predictions: One for each picture, in their order; empty where they were
            not kept.
        pictures: How many there were.
        objects: How many were found, by class; of a segmentor, in how many pictures
            a class was.
        failures: Why each picture that could not be used could not.
        notes: What was changed in how many pictures.
        noted: The first file for each of these.
        seconds: Without the time to load the model.
    """

    predictions: 'list[Prediction]' = field(default_factory=list)
    pictures: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    noted: dict[str, str] = field(default_factory=dict)
    seconds: float = 0

    def __iter__(self) -> 'Iterator[Prediction]':
        return iter(self.predictions)

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, index: int) -> 'Prediction':
        return self.predictions[index]


def infer(
    model: 'str | Predictor',
    source: Any,
    out: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str | None = None,
    batch: int = 1,
    score: float = 0.3,
    tta: bool = False,
    deploy: bool = True,
    pictures: bool = True,
    data: bool = True,
    ground_truth: str | None = None,
    opacity: float = 0.5,
    with_labels: bool = True,
    every: int = 1,
    limit: int | None = None,
    cfg_options: dict | None = None,
    keep: bool = True,
    progress: bool = True,
    result: Inference | None = None,
) -> Inference:
    """Finds objects in pictures, or segments them.

        result = convnext_mm.infer('mask-rcnn_convnext-t', 'photo.jpg', out='found')
        result[0].boxes

    Args:
        model: Name of a trained model (``convnext-mm zoo``), a config with
            ``checkpoint``, a work folder; or a
            :class:`~convnext_mm.apis.inference.predictor.Predictor`.
        source: What to look at, or a list: files, folders, patterns, addresses,
            videos, ``'camera'``, ``'-'`` (standard input), arrays of (H, W, 3)
            uint8 with blue first.
        out: Folder to write to, see :class:`.outputs.Outputs`; None: nothing is.
        checkpoint: Path or address, where ``model`` is a config.
        device: Such as ``'cpu'`` or ``'cuda:1'``; by default the best there is.
        batch: Pictures at once; a segmentor takes those of one size together.
        score: Objects with lower scores are left out.
        tta: Average over scales and flips, as the config says.
        deploy: Fold and pack the backbone for inference.
        pictures, data: What to write into ``out``.
        ground_truth: Draw annotations beside: a json file in COCO format, or a
            folder of class maps.
        opacity: Of the colours over a picture.
        with_labels: Write the names of classes into a segmentor's pictures.
        every: Of videos only each so many-th frame.
        limit: Stop after so many pictures.
        cfg_options: Settings of the config to override.
        keep: Give the predictions back; without, any number of pictures fits into
            memory.
        progress: Show progress.
        result: To be filled; a caller has it also after Ctrl-C.

    Raises:
        ConfigError: A name or setting is wrong, or the disk is full.
        CheckpointError: The weights cannot be fetched or read, or do not fit.
        DataError: There is nothing to look at, or no picture could be used. Others
            that cannot are in ``failures``.
    """
    _check(batch=batch, every=every)
    _check_share(score=score, opacity=opacity)
    if limit is not None:
        _check(limit=limit)
    from . import ground_truth as truths
    from . import sources
    from .outputs import Outputs
    from .prediction import to_prediction
    from .predictor import Predictor

    given = list(source) if isinstance(source, (list, tuple)) else [source]
    if out is not None and not str(out):
        raise ConfigError('the folder to write to has no name (--out)')
    written = [Path(out, room) for room in ('pictures', 'maps')] if out else []
    found = sources.entries(given, written)
    if not isinstance(model, Predictor):
        predictor = Predictor(model, checkpoint, device, tta, deploy, cfg_options)
    elif checkpoint or device or tta or cfg_options or not deploy:
        raise ConfigError(
            'checkpoint, device, tta, deploy and cfg_options are arguments of '
            'Predictor, where model is one'
        )
    else:
        predictor = model
    truth = truths.load(ground_truth, predictor) if ground_truth else None
    result = Inference() if result is None else result
    total = sources.count(found, every)
    if limit is not None:
        total = limit if total is None else min(limit, total)
    pictures_read = _usable(
        sources.read(found, predictor.max_pixels, every), result, limit
    )
    writer = (
        Outputs(
            out,
            predictor.classes,
            predictor.dataset_meta['palette'],
            data,
            truth.category_ids if truth else None,
            truth.next_image_id if truth else 1,
            [entry.place for entry in found] + (truth.paths if truth else []),
        )
        if out
        else None
    )
    try:
        with _progress(progress, total) as advance, writer or nullcontext():
            start = time.monotonic()
            for group in _batches(pictures_read, batch, predictor.can_batch):
                for picture, sample in zip(group, predictor(group, score)):
                    prediction = to_prediction(picture, sample, predictor.classes)
                    number = None
                    try:
                        if truth is not None:
                            number = truth.image_id(picture)
                            truth.add_to(sample, picture)
                    except DataError as error:
                        result.failures.append(str(error))
                    if writer is not None:
                        writer.add_prediction(prediction, number)
                    if writer is not None and pictures:
                        drawn = predictor.draw(picture, sample, opacity, with_labels)
                        writer.add_picture(picture, drawn)
                    if keep:
                        result.predictions.append(prediction)
                    _count(result, prediction)
                    result.seconds = time.monotonic() - start
                    advance()
    except OSError as error:
        if writer is None:
            raise
        raise ConfigError(
            f'{error.filename or out}: {error.strerror}. {result.pictures} pictures '
            'are done; free disk, or give another folder with --out'
        ) from None
    if not result.pictures:
        raise DataError(f'no picture could be used: {"; ".join(result.failures[:3])}')
    if truth is not None and not truth.files.used:
        result.failures.append(
            f'{ground_truth} has nothing of any of these pictures: their files must be '
            'called the same'
        )
    return result


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f'{name} is a number from 1 on, got {value}')


def _check_share(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ConfigError(f'{name} is a number from 0 to 1, got {value}')


def _usable(read: Iterator[Any], result: Inference, limit: int | None) -> Iterator[Any]:
    """The pictures; why others are none goes into the result."""
    count = 0
    for item in read:
        if isinstance(item, DataError):
            result.failures.append(str(item))
            continue
        if item.note:
            result.notes[item.note] += 1
            result.noted.setdefault(item.note, item.file)
        yield item
        count += 1
        if count == limit:
            return


def _batches(
    pictures: Iterator[Any], size: int, can_batch: Callable[[Any, Any], bool]
) -> Iterator[Sequence[Any]]:
    batch: list[Any] = []
    for picture in pictures:
        if batch and (len(batch) == size or not can_batch(batch[0], picture)):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


def _count(result: Inference, prediction: 'Prediction') -> None:
    result.pictures += 1
    if prediction.class_map is not None:
        labels = np.unique(prediction.class_map)
    else:
        labels = np.asarray(prediction.labels)
    result.objects.update(prediction.classes[label] for label in labels.tolist())


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text()
        return Text(
            f'{speed:.1f} images/s' if speed > 1 else f'{1 / speed:.1f} s/image'
        )


@contextmanager
def _progress(is_on: bool, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on standard error; gives what moves it on."""
    columns = BarColumn(), MofNCompleteColumn(), _Speed()
    console = Console(stderr=True, force_jupyter=False)
    with Progress(*columns, console=console, disable=not is_on) as bar:
        task = bar.add_task('', total=total)
        yield lambda: bar.advance(task)
