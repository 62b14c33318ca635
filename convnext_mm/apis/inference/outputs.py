"""Files of what was found. Each is complete under its name, or not there."""

import contextlib
import csv
import errno
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import cv2
import numpy as np
from PIL import Image

from convnext_mm.engine.errors import ConfigError

from .prediction import Prediction, mask_area
from .sources import Picture, Video

# COCO numbers its 80 classes from 1 to 90.
COCO_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
JPEG_QUALITY = 95


class Outputs:
    """Writes below a folder:

    - ``pictures/NAME.jpg`` (``.png`` where the source is one), and ``NAME.mp4`` of
      a video: what was found, drawn;
    - ``predictions.json``: objects in COCO's format, with scores;
    - ``maps/NAME.png``: class maps, pixels are indices of classes, shown in the
      classes' colours;
    - ``predictions.csv``, line by line: each object, or each class of a class map.

    Args:
        folder: Made where it is missing.
        classes: Names.
        palette: Colours of the classes, red first.
        data: Write the json, csv and maps.
        category_ids: Of the classes in the json; by default COCO's own for COCO's
            classes, else from 1 on.
        next_image_id: Of the first picture that has no id.
        sources: Files that must not be overwritten, ground truth among them.

    Raises:
        ConfigError: Nothing can be written there, or another run writes there.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        classes: Sequence[str],
        palette: Any,
        data: bool = True,
        category_ids: Sequence[int] | None = None,
        next_image_id: int = 1,
        sources: Iterable[str] = (),
    ) -> None:
        self.folder = Path(folder)
        self.classes, self.data = tuple(classes), data
        self.palette = np.array(palette, np.uint8)[:256]
        self.category_ids = category_ids or _category_ids(self.classes)
        self.next_image_id = next_image_id
        self._sources = {os.path.realpath(source) for source in sources}
        self._video: tuple[Video, cv2.VideoWriter, Path, tuple[int, int]] | None = None
        self._json: _CocoFile | None = None
        self._csv: TextIO | None = None
        self._rows: Any = None
        self._whole = 0  # bytes of whole lines
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f'.{os.getpid()}.tmp'
            probe.write_bytes(b'')
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f'nothing can be written into {self.folder} ({error.strerror}): give '
                'another folder with --out'
            ) from None
        earlier = [self._target('', f'predictions.{kind}') for kind in ('json', 'csv')]
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigError(
                f'another run writes to {self.folder}: give another folder with --out'
            ) from None
        except OSError:  # not every file system has locks
            pass
        for path in earlier:  # they would pass for what this run found
            if path.is_file():
                path.unlink()

    def __enter__(self) -> 'Outputs':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Also after Ctrl-C: what was found until then is written. On a full disk
        what cannot be finished is taken away."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._lock)
            if self._csv:
                stack.callback(self._end_csv)
            if self._json:
                stack.callback(self._json.close)
            stack.callback(self._end_video)

    def add_picture(self, picture: Picture, drawn: np.ndarray) -> None:
        """
        Args:
            picture: It was drawn on.
            drawn: (H, W, 3) uint8, red first.
        """
        bgr = drawn[:, :, ::-1]
        if picture.video is not None:
            self._add_frame(picture.video, bgr)
            return
        self._end_video()
        suffix = '.png' if picture.file.lower().endswith('.png') else '.jpg'
        target = self._target('pictures', f'{picture.name}{suffix}')
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == '.jpg' else []
        _write(target, cv2.imencode(suffix, bgr, options)[1].tobytes())

    def add_prediction(
        self, prediction: Prediction, image_id: int | None = None
    ) -> None:
        """
        Args:
            prediction: Of a picture or frame.
            image_id: Of the picture in a file of annotations, where it is in one.
        """
        if not self.data:
            return
        if prediction.class_map is not None:
            self._add_map(prediction)
        else:
            self._add_objects(prediction, image_id)

    def _target(self, room: str, name: str) -> Path:
        """
        Raises:
            ConfigError: It is one of the sources.
        """
        target = self.folder / room / name
        if os.path.realpath(target) in self._sources:
            raise ConfigError(
                f'{target} is one of the sources, and would be overwritten: give '
                'another folder with --out'
            )
        return target

    def _add_frame(self, video: Video, bgr: np.ndarray) -> None:
        # mp4 has two pixels for one colour.
        height, width = (side - side % 2 for side in bgr.shape[:2])
        if self._video is None or self._video[0] != video:
            self._end_video()
            target = self._target('pictures', f'{video.name}.mp4')
            partial = target.with_name(f'{target.stem}.part.mp4')
            partial.parent.mkdir(parents=True, exist_ok=True)
            fourcc = cv2.VideoWriter.fourcc(*'mp4v')
            writer = cv2.VideoWriter(str(partial), fourcc, video.fps, (width, height))
            if not writer.isOpened():
                raise ConfigError(
                    f'{target} cannot be written as a video by this OpenCV: leave the '
                    'pictures out with --no-pictures'
                )
            self._video = (video, writer, target, (width, height))
        _, writer, _, size = self._video
        if size != (width, height):  # a camera that was turned
            bgr = cv2.resize(bgr, size)
        writer.write(np.ascontiguousarray(bgr[: size[1], : size[0]]))

    def _end_video(self) -> None:
        if self._video is None:
            return
        _, writer, target, _ = self._video
        self._video = None
        writer.release()
        partial = target.with_name(f'{target.stem}.part.mp4')
        # OpenCV says nothing when a disk is full.
        if partial.is_file() and cv2.VideoCapture(str(partial)).isOpened():
            os.replace(partial, target)
        else:
            partial.unlink(missing_ok=True)
            raise OSError(errno.ENOSPC, 'No space left, perhaps', str(target))

    def _add_map(self, prediction: Prediction) -> None:
        class_map = prediction.class_map
        assert class_map is not None
        target = self._target('maps', f'{prediction.name}.png')
        image = Image.fromarray(class_map)
        if class_map.dtype == np.uint8:
            image.putpalette(self.palette.tobytes())
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f'{target.name}.tmp')
        image.save(partial, 'png')
        os.replace(partial, target)
        counts = np.bincount(class_map.ravel(), minlength=len(self.classes))
        self._add_rows(
            ('file', 'frame', 'class', 'pixels', 'share'),
            (
                (*_where(prediction), name, count, f'{count / class_map.size:.6f}')
                for name, count in zip(self.classes, counts)
                if count
            ),
        )

    def _add_objects(self, prediction: Prediction, number: int | None) -> None:
        labels, scores, boxes = prediction.labels, prediction.scores, prediction.boxes
        assert labels is not None and scores is not None and boxes is not None
        if self._json is None:
            categories = [
                dict(id=number, name=name)
                for number, name in zip(self.category_ids, self.classes)
            ]
            self._json = _CocoFile(self.folder / 'predictions.json', categories)
        image: dict[str, Any] = dict(file_name=prediction.file)
        if prediction.frame is not None:
            image['frame'] = prediction.frame
        objects, rows = [], []
        for index, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
            left, top, right, bottom = boxes[index].tolist()
            area = (right - left) * (bottom - top)
            found: dict[str, Any] = dict(
                category_id=self.category_ids[label],
                bbox=[round(v, 2) for v in (left, top, right - left, bottom - top)],
                score=round(score, 5),
                iscrowd=0,
            )
            if prediction.masks is not None:
                found['segmentation'] = prediction.masks[index]
                area = mask_area(prediction.masks[index])
            found['area'] = round(area, 2)
            objects.append(found)
            box = (f'{v:.2f}' for v in (left, top, right, bottom))
            what = (self.classes[label], f'{score:.5f}', *box, f'{area:.0f}')
            rows.append((*_where(prediction), *what))
        if number is None:
            number, self.next_image_id = self.next_image_id, self.next_image_id + 1
        self._json.add(dict(id=number, **image), prediction.size, objects)
        columns = 'file frame class score left top right bottom area'.split()
        self._add_rows(columns, rows)

    def _add_rows(self, columns: Sequence[str], rows: Any) -> None:
        """Written line by line: a reader sees whole lines at any time."""
        if self._csv is None:
            self._csv = open(  # noqa: SIM115, closed by __exit__
                self.folder / 'predictions.csv',
                'w',
                newline='',
                encoding='utf-8',
                errors='surrogateescape',  # names of files need not be UTF-8
            )
            self._rows = csv.writer(self._csv)
            self._rows.writerow(columns)
        self._rows.writerows(rows)
        self._csv.flush()
        self._whole = self._csv.tell()

    def _end_csv(self) -> None:
        """Without the half of a line that a full disk has left."""
        assert self._csv is not None
        try:
            self._csv.close()
        except OSError:
            os.truncate(self.folder / 'predictions.csv', self._whole)
            raise


class _CocoFile:
    """COCO's format, written as it comes; the file has its name once it is whole."""

    def __init__(self, path: Path, categories: list[dict]) -> None:
        self.path, self.partial = path, path.with_name(f'{path.name}.tmp')
        self.images: list[dict] = []
        self.count = 0
        self.file = open(self.partial, 'w')  # noqa: SIM115, closed by close
        self.file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def add(
        self, image: dict[str, Any], size: tuple[int, int], objects: list[dict]
    ) -> None:
        number = image['id']
        width, height = size
        self.images.append(dict(width=width, height=height, **image))
        for found in objects:
            self.file.write(',\n' if self.count else '\n')
            self.count += 1
            self.file.write(json.dumps(dict(id=self.count, image_id=number, **found)))

    def close(self) -> None:
        try:
            with self.file as file:
                file.write(f'\n],\n"images": {json.dumps(self.images)}}}\n')
            os.replace(self.partial, self.path)
        except OSError:
            self.partial.unlink(missing_ok=True)
            raise


def _category_ids(classes: tuple[str, ...]) -> list[int]:
    if len(classes) == 80 and classes[0] == 'person' and classes[-1] == 'toothbrush':
        return [n for n in range(1, 91) if n not in COCO_GAPS]
    return list(range(1, len(classes) + 1))


def _where(prediction: Prediction) -> tuple[str, int | str]:
    return prediction.file, '' if prediction.frame is None else prediction.frame


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'{target.name}.tmp')
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
