"""Randomness as a function of the seed and the position in training, not of what
came before: what a run draws after an interruption is what it would have drawn,
with any number of data workers."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import get_rank, get_world_size
from torch.utils.data import DataLoader, Dataset, Sampler

SAMPLES, STEPS = 0, 1  # what is drawn for; part of the seed


def seed_generators(*key: int, device: bool = False) -> None:
    """Seeds the generators of Python, NumPy and PyTorch.

    Args:
        *key: Non-negative integers; each sequence gives other draws.
        device: The generator of the current accelerator as well.
    """
    words = np.random.SeedSequence(key).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])
    seed = int(words[4]) << 32 | int(words[5])
    # torch.manual_seed would ask for the devices in each data worker.
    torch.default_generator.manual_seed(seed)
    if device and (kind := get_device()) != 'cpu':
        getattr(torch, kind).manual_seed(seed)


def seed_step(seed: int, iteration: int) -> None:
    """Before a training step: dropout, drop path and the like of each process
    are drawn anew, and as in any other run of this seed."""
    seed_generators(STEPS, seed, iteration, get_rank(), device=True)


class Sample(int):
    """The index of a sample that knows where in training it stands."""

    key: tuple[int, ...]


class PositionedBatches(Sampler[list[Any]]):
    """The batches of one process, from any of them on.

    The k-th sample of process r of w has position ``k * w + r``: a sampler that
    deals samples out by turns gives a position the same sample whatever w is.

    Args:
        batches: A batch sampler.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.sampler = getattr(batches, 'sampler', None)
        self.batch_size = batches.batch_size
        self.round = 0  # how often the sampler has come to its end
        self.start = 0  # batches to leave out of the next round

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Any]]:
        start, self.start = self.start, 0
        for number, batch in enumerate(self.batches):
            if number >= start:
                yield [
                    self._positioned(index, number * self.batch_size + place)
                    for place, index in enumerate(batch)
                ]

    def _positioned(self, index: Any, nth: int) -> Any:
        if not isinstance(index, int):  # as of samplers for videos
            return index
        sample = Sample(index)
        sample.key = (self.round, nth * get_world_size() + get_rank())
        return sample


class SeededLoading:
    """A data set's ``__getitems__``: each sample is loaded and augmented by what
    its position draws.

    Args:
        dataset: The data set.
        seed: Of the run.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.load = getattr(dataset, '__getitems__', None)

    def __call__(self, samples: Sequence[Any]) -> Iterable[Any]:
        if self.load is not None:
            self._seed(samples[0])
            return self.load([_plain(sample) for sample in samples])
        return [self._load(sample) for sample in samples]

    def _load(self, sample: Any) -> Any:
        self._seed(sample)
        return self.dataset[_plain(sample)]

    def _seed(self, sample: Any) -> None:
        if isinstance(sample, Sample):
            seed_generators(SAMPLES, self.seed, *sample.key)


def _plain(sample: Any) -> Any:
    return int(sample) if isinstance(sample, Sample) else sample


class Position:
    """Where a process stands in its data.

    Args:
        loader: Its batches and data set learn positions, in place. One without
            batches of indices, as of an iterable data set, is left as it is, and
            starts anew when a run resumes.
        seed: Of the run.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.loader = loader
        self.batches: PositionedBatches | None = None
        self.taken = 0  # batches of this round
        if isinstance(getattr(loader.batch_sampler, 'batch_size', None), int):
            self.batches = PositionedBatches(loader.batch_sampler)
            # A loader lets nobody replace it, for it sizes its parts by it.
            vars(loader)['batch_sampler'] = self.batches
            self.loading = SeededLoading(loader.dataset, seed)
            loader.dataset.__getitems__ = self.loading  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size if self.batches is not None else 0

    @property
    def round(self) -> int:
        return self.batches.round if self.batches is not None else 0

    def start_round(self, number: int, taken: int = 0) -> None:
        """Goes to a round of the sampler, behind some batches of it."""
        self.taken = taken
        if self.batches is not None:
            self.batches.round, self.batches.start = number, taken
            samplers: tuple[Any, Any] = self.loader.sampler, self.batches.sampler
            for sampler in samplers:
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(number)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers to go on from."""
        return dict(
            round=self.round,
            taken=self.taken,
            batch_size=self.batch_size,
            world_size=get_world_size(),
            sampler_seed=getattr(self._sampler(), 'seed', None),
        )

    def load_state_dict(self, state: dict[str, Any], seed: int) -> int:
        """Goes where another process stood, and gives how many samples, of all
        processes together, that round had before.

        Args:
            state: Of :meth:`state_dict`, of any number of processes and batch
                size. Where what was taken is no multiple of today's batches, the
                samples of a part of one come again.
            seed: Of the run that is resumed.
        """
        if self.batches is None:
            return 0
        self.loading.seed = seed
        if state.get('sampler_seed') is not None and hasattr(self._sampler(), 'seed'):
            self._sampler().seed = state['sampler_seed']
        samples = state['taken'] * state['batch_size'] * state['world_size']
        self.start_round(
            state['round'], samples // (self.batches.batch_size * get_world_size())
        )
        return samples

    def _sampler(self) -> Any:
        return self.batches.sampler if self.batches is not None else None
