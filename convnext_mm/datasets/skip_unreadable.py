"""Training that goes on without a few images that cannot be read."""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from ctypes import Array, c_byte
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from .errors import DataError, UnreadableError


class SkipUnreadable:
    """Gives another sample in place of one whose files cannot be read.

    Which one depends on the index alone: a run that is repeated or resumed sees
    the same. A file that failed once is not tried again.

    Args:
        dataset: Whose samples.
        known: 1 for each that cannot be read, in shared memory: all workers of a
            process know what one of them met.
        all_known: ``known`` of all data sets that share the limit.
        limit: More are an error.
        listing: Text file that gets a line for each.
    """

    def __init__(
        self,
        dataset: BaseDataset,
        known: Array[c_byte],
        all_known: Sequence[Array[c_byte]],
        limit: int,
        listing: Path | None,
    ) -> None:
        self.load = dataset.prepare_data
        self.known = known
        self.all_known = all_known
        self.limit = limit
        self.listing = listing

    def __call__(self, index: int) -> Any:
        for candidate in itertools.chain([index], self._others(index)):
            if not self.known[candidate]:
                try:
                    return self.load(candidate)
                except UnreadableError as error:
                    self.note(candidate, error)
        raise DataError(f'none of {len(self.known)} images can be read')

    def note(self, index: int, error: UnreadableError) -> None:
        """Lists a sample that cannot be read, once.

        Raises:
            UnreadableError: It is one more than the limit.
        """
        if self.known[index]:
            return
        self.known[index] = 1
        count = sum(map(sum, self.all_known))
        if count > self.limit:
            raise UnreadableError(
                f'{error}; {count} files cannot be read, and max_unreadable_images is '
                f'{self.limit}'
            ) from error
        print_log(
            f'{error.fault}: another image takes its place ({count} of '
            f'max_unreadable_images={self.limit})',
            logger='current',
            level=logging.WARNING,
        )
        if self.listing is not None:
            with contextlib.suppress(OSError), open(self.listing, 'a') as file:
                file.write(f'{error.fault}\n')

    def _others(self, index: int) -> Iterator[int]:
        yield from np.random.default_rng(index).permutation(len(self.known)).tolist()


def skip_unreadable(
    datasets: Sequence[BaseDataset], limit: int, listing: Path | None
) -> list[SkipUnreadable]:
    """Lets data sets, in place, do without so many images together.

    Args:
        datasets: Of one data loader.
        limit: For the processes that load for this one; each process that
            trains has its own count.
        listing: Text file that gets a line for each, in a folder that exists.
    """
    all_known = [RawArray(c_byte, len(dataset)) for dataset in datasets]
    skips = []
    for dataset, known in zip(datasets, all_known):
        skips.append(SkipUnreadable(dataset, known, all_known, limit, listing))
        dataset.prepare_data = skips[-1]
    return skips
