"""The paper's tables of speed and memory, measured where this runs, beside the
published figures."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from convnext_mm.analysis.machine import machine, versions
from convnext_mm.analysis.meter import Meter, Step, own_bytes
from convnext_mm.checkpoint.write import write_text
from convnext_mm.engine.errors import ConfigError
from convnext_mm.version import __version__

from . import published
from .bench import DTYPES, Running, check_names
from .networks import DEPLOY, OURS, PEER_MODULES, Networks, one_line
from .published import Figures

BLOCKS = tuple(published.CONDITIONS)
STOCK = ('paper', 'mmpretrain')
DEFAULT_NETWORKS = ('auto', *STOCK, 'resnet50', 'swin')
NETWORKS = (*OURS, *STOCK, 'resnet50', 'swin')
DEFAULT_BATCH = dict(cpu=2, cuda=64)
TASKS = {'Mask R-CNN': 'detector', 'Cascade': 'cascade'}
AUTOCAST = ('fp32', 'amp', 'amp-fp16')
# By block and quantity; the recipe that memory was published for has mixed precision.
DEFAULT_DTYPES = {
    ('throughput', 'images_per_s'): ('fp32', 'bf16'),
    ('detectors', 'images_per_s'): ('fp32',),
    ('memory', 'peak_bytes'): ('amp',),
    ('isotropic', 'images_per_s'): ('fp32', 'bf16'),
    ('isotropic', 'peak_bytes'): ('fp32',),
}
# Of a row that has no figure, what became of it.
NOT_MEASURABLE, NOT_INSTALLED = 'not measurable here', 'not installed'
OUT_OF_MEMORY, FAILED = 'out of memory', 'failed'
NEEDS_GPU = "the peak is what PyTorch's CUDA allocator counts: --device cuda"


class Case(NamedTuple):
    """Networks that take turns.

    Attributes:
        block: One of ``BLOCKS``.
        model: ``'ConvNeXt'``, ``'isotropic'``, or a detector.
        arch: Of ConvNeXt.
        quantity: ``'images_per_s'`` or ``'peak_bytes'``.
        size: (H, W) of the images.
        batch: How many of them.
        networks: That take part.
        dtypes: That are measured, of ``DTYPES`` and in their order.
        figures: Published for this case, None where there are none.
    """

    block: str
    model: str
    arch: str
    quantity: str
    size: tuple[int, int]
    batch: int
    networks: tuple[str, ...]
    dtypes: tuple[str, ...]
    figures: Figures | None

    @property
    def title(self) -> str:
        letter = published.LETTERS[self.arch]
        joint = '-' if self.model == 'ConvNeXt' else ' '
        return f'{self.model}{joint}{letter}, {self.size[0]} x {self.size[1]}'


@dataclasses.dataclass
class PaperSettings(Running):
    """What of the tables to measure. The fields are the options of ``convnext-mm
    bench --paper``; what is empty, or None, is the paper's or chosen by device.

    Args:
        blocks: Of ``BLOCKS``.
        arch: Of ConvNeXt: tiny, small, base, large, xlarge.
        dtype: Of ``DTYPES``. fp32 is TF32 on GPUs that have it.
        networks: Of ``NETWORKS``.
        batch: Of classifiers in inference; detectors and training memory have the
            paper's.
        size: (H, W), instead of the paper's, for which nothing is published.

    Raises:
        ConfigError: What does not go together, or leaves nothing to measure.
    """

    blocks: Sequence[str] = ()
    arch: Sequence[str] = ()
    dtype: Sequence[str] = ()
    networks: Sequence[str] = ()
    batch: int | None = None
    size: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_names('paper', BLOCKS, self.blocks)
        check_names('arch', published.LETTERS, self.arch)
        check_names('dtype', DTYPES, self.dtype)
        check_names('networks', NETWORKS, self.networks)
        super().__post_init__()
        if any(side < 32 for side in self.size):
            raise ConfigError(
                f'--size {" ".join(map(str, self.size))}: both must be at least 32'
            )
        if self.batch is not None:
            self._check_batch(self.batch)
        if self.device == 'cpu' and list(self.blocks) == ['memory']:
            raise ConfigError(f'--paper memory: {NEEDS_GPU}; PyTorch must see a GPU')
        self._check_use()

    @property
    def contenders(self) -> tuple[str, ...]:
        """The networks to measure, in their order."""
        return tuple(dict.fromkeys(self.networks or DEFAULT_NETWORKS))

    def _check_batch(self, batch: int) -> None:
        if batch < 1:
            raise ConfigError(f'--batch must be at least 1, not {batch}')
        if self.blocks and not {'throughput', 'isotropic'} & {*self.blocks}:
            raise ConfigError(
                f'--batch {batch}: is for throughput and isotropic; detectors run on 1 '
                'image and train on 2, as in the paper'
            )

    def _check_use(self) -> None:
        """That each block that was named has a row, and all else that was named is
        in one."""
        cases = self.cases()
        given = ', '.join(
            f'--{option} {" ".join(getattr(self, option))}'
            for option in ('arch', 'dtype', 'networks')
            if getattr(self, option)
        )
        for block in self.blocks or ([] if cases else BLOCKS):
            if not any(case.block == block for case in cases):
                rows = [case for case in all_cases(self) if case.block == block]
                has = '; '.join(
                    f'{option} {", ".join(dict.fromkeys(values))}'
                    for option, values in dict(
                        arch=[case.arch for case in rows],
                        dtype=[dtype for case in rows for dtype in case.dtypes],
                        networks=[name for case in rows for name in case.networks],
                    ).items()
                )
                raise ConfigError(
                    f'--paper {block}: nothing is left of it by {given}; it has {has}'
                )
        for option, named, used in (
            ('arch', self.arch, {case.arch for case in cases}),
            ('dtype', self.dtype, {d for case in cases for d in case.dtypes}),
            ('networks', self.networks, {n for case in cases for n in case.networks}),
        ):
            for name in named:
                if name not in used:
                    raise ConfigError(
                        f'--{option} {name}: is in none of the rows that are chosen; '
                        'leave it out'
                    )

    def cases(self) -> list[Case]:
        """What is measured, in this order."""
        found = []
        for case in all_cases(self):
            dtypes = self.dtype or DEFAULT_DTYPES[case.block, case.quantity]
            chosen = case._replace(
                networks=tuple(n for n in self.contenders if n in case.networks),
                dtypes=tuple(d for d in case.dtypes if d in dtypes),
            )
            if (
                case.block in (self.blocks or BLOCKS)
                and (not self.arch or case.arch in self.arch)
                and chosen.networks
                and chosen.dtypes
            ):
                found.append(chosen)
        return found

    def left_out(self) -> list[str]:
        """What of the tables the settings leave no row of, in sentences."""
        there = {case.block for case in self.cases()}
        return [
            f'{block}: no row of it has what was asked for'
            for block in self.blocks or BLOCKS
            if block not in there
        ]

    def shared(self) -> dict[str, Any]:
        """What all rows of one file have in common."""
        return dict(
            networks=list(self.contenders),
            rounds=self.rounds,
            warmup=self.warmup,
            clock=self.clock,
        )


def all_cases(settings: PaperSettings) -> Iterator[Case]:
    """Every row of the paper's tables, with all networks and dtypes that it can
    have, at the settings' size and batch."""
    ours_and_peers = (*OURS, *STOCK)
    any_dtype = tuple(DTYPES)
    batch = settings.batch or DEFAULT_BATCH[settings.device]

    def case(block: str, model: str, arch: str, quantity: str, **facts: Any) -> Case:
        size, figures = facts.pop('size'), facts.pop('figures')
        if settings.size and tuple(settings.size) != size:
            size, figures = tuple(settings.size), None
        return Case(block, model, arch, quantity, size, figures=figures, **facts)

    for (arch, side), figures in published.THROUGHPUT.items():
        if settings.size and side != 224:
            continue  # both sides would be the same row
        yield case(
            'throughput',
            'ConvNeXt',
            arch,
            'images_per_s',
            size=(side, side),
            figures=figures,
            batch=batch,
            networks=(*ours_and_peers, 'resnet50', *_swin(figures)),
            dtypes=any_dtype,
        )
    for (model, arch), figures in published.FPS.items():
        yield case(
            'detectors',
            model,
            arch,
            'images_per_s',
            size=published.DETECTOR_SIZE,
            figures=figures,
            batch=1,
            networks=(
                *ours_and_peers,
                *_swin(figures),
                *(['resnet50'] if figures.resnet50 else []),
            ),
            dtypes=('fp32',),
        )
    trainable = tuple(name for name in ours_and_peers if not name.endswith(DEPLOY))
    for (model, arch), figures in published.MEMORY.items():
        yield case(
            'memory',
            model,
            arch,
            'peak_bytes',
            size=published.DETECTOR_SIZE,
            figures=figures,
            batch=published.MEMORY_BATCH,
            networks=(*trainable, *_swin(figures)),
            dtypes=AUTOCAST,
        )
    for arch, figures in published.ISOTROPIC_THROUGHPUT.items():
        yield case(
            'isotropic',
            'isotropic',
            arch,
            'images_per_s',
            size=published.ISOTROPIC_SIZE,
            figures=figures,
            batch=batch,
            networks=(*OURS, 'paper'),
            dtypes=any_dtype,
        )
        yield case(
            'isotropic',
            'isotropic',
            arch,
            'peak_bytes',
            size=published.ISOTROPIC_SIZE,
            figures=published.ISOTROPIC_MEMORY[arch],
            batch=published.ISOTROPIC_BATCH,
            networks=tuple(n for n in trainable if n != 'mmpretrain'),
            dtypes=AUTOCAST,
        )


def _swin(figures: Figures) -> list[str]:
    """There is no Swin of every size."""
    return ['swin'] if figures.swin else []


class PaperBench:
    """Measures one case after another."""

    def __init__(self, settings: PaperSettings) -> None:
        self.settings = settings
        self.meter = Meter(settings.device, settings.clock)

    def rows(self, case: Case) -> Iterator[list[dict]]:
        """Of one dtype after another: a row for each network.

        Raises:
            ConfigError: The recipes are not there.
            SystemExit: One of ours gives something else than plain PyTorch.
        """
        measure = self._peaks if case.quantity == 'peak_bytes' else self._speeds
        for dtype, found in measure(case):
            yield [
                dict(
                    block=case.block,
                    row=case.title,
                    quantity=case.quantity,
                    batch=case.batch,
                    dtype=dtype,
                    network=name,
                    published=case.figures and case.figures._asdict(),
                    load_average=os.getloadavg(),
                    **found[name],
                )
                for name in case.networks
            ]

    def _speeds(self, case: Case) -> Iterator[tuple[str, dict[str, dict]]]:
        steps_of, missing = self._prepared(case)
        for dtype in case.dtypes:
            found = dict(missing)
            with _tf32(self.settings.device):
                steps = {}
                for name, step in steps_of(dtype).items():
                    if reason := _why_not(step):
                        found[name] = _missing(reason)
                    else:
                        steps[name] = step
                found.update(self._in_turns(steps, case.batch))
            yield dtype, found

    def _in_turns(self, steps: dict[str, Step], batch: int) -> dict[str, dict]:
        """A network that fails late ends the round of all."""
        rounds, warmup = self.settings.rounds, self.settings.warmup
        try:
            times = self.meter.times(steps, rounds, warmup)
        except Exception as error:  # whatever a driver may raise
            return dict.fromkeys(steps, _missing(one_line(error)))
        return {
            name: dict(images_per_s=1e3 * batch / row['median_ms'], **row)
            for name, row in times.items()
        }

    def _prepared(
        self, case: Case
    ) -> tuple[Callable[[str], dict[str, Step]], dict[str, dict]]:
        """(steps by name, for a dtype; what became of the other networks). Dtypes
        come in the order of ``DTYPES``: casting a network has no way back."""
        if case.block == 'detectors':
            return self._prepared_detectors(case)
        networks = self._classifiers(case, case.networks)
        from .classifiers import inference

        def steps_of(dtype: str) -> dict[str, Step]:
            precision = DTYPES[dtype]
            x = self._images(case).to(precision.parameters)
            return {
                name: inference(network.to(precision.parameters), x, precision.autocast)
                for name, network in networks.built.items()
            }

        return steps_of, {n: _missing(why) for n, why in networks.skipped.items()}

    def _classifiers(self, case: Case, names: Sequence[str]) -> Networks:
        from .classifiers import build_classifiers, build_isotropic

        if case.model == 'isotropic':
            rate = published.ISOTROPIC_DROP_PATH[case.arch]
            return build_isotropic(names, case.arch, self.settings.device, rate)
        return build_classifiers(names, case.arch, self.settings.device, max(case.size))

    def _images(self, case: Case) -> torch.Tensor:
        x = torch.rand(case.batch, 3, *case.size, device=self.settings.device)
        return x.contiguous(memory_format=torch.channels_last)

    def _prepared_detectors(
        self, case: Case
    ) -> tuple[Callable[[str], dict[str, Step]], dict[str, dict]]:
        missing, names = {}, list(case.networks)
        if 'mmpretrain' in names and (reason := _import_error('mmpretrain')):
            missing['mmpretrain'] = _missing(reason)
            names.remove('mmpretrain')
        try:
            from .detectors import Inference

            detectors = Inference(
                TASKS[case.model],
                names,
                case.arch,
                case.batch,
                case.size,
                'fp32',
                self.settings.device,
            )
            detectors.check_equal()
        except ConfigError:
            raise
        except Exception as error:  # whatever a library may raise
            missing.update(dict.fromkeys(names, _missing(one_line(error))))
            return lambda dtype: {}, missing
        return lambda dtype: {name: detectors.step(name) for name in names}, missing

    def _peaks(self, case: Case) -> Iterator[tuple[str, dict[str, dict]]]:
        for dtype in case.dtypes:
            if self.settings.device == 'cpu':
                not_here = dict(status=NOT_MEASURABLE, reason=NEEDS_GPU)
                yield dtype, dict.fromkeys(case.networks, not_here)
            else:
                with _tf32('cuda'):
                    yield (
                        dtype,
                        {name: self._peak(case, name, dtype) for name in case.networks},
                    )

    def _peak(self, case: Case, name: str, dtype: str) -> dict:
        """Of one network, with nothing else on the device."""
        try:
            step, own = self._training(case, name, dtype)
            step.run()  # makes the optimizer's state, and chooses kernels
            step.reset()
            peaks = [self.meter.peak(step, own()) for _ in range(self.settings.rounds)]
            return dict(peak_bytes=max(peaks))
        except ConfigError:
            raise
        except Exception as error:  # whatever a driver or library may raise
            return _missing(one_line(error))
        finally:
            step = own = None  # type: ignore[assignment]
            _free()

    def _training(
        self, case: Case, name: str, dtype: str
    ) -> tuple[Step, Callable[[], int]]:
        """A train step, and the bytes of a network and its optimizer."""
        from .models import Training, state_bytes

        device = self.settings.device
        if case.model != 'isotropic':
            training = Training(
                TASKS[case.model],
                [name],
                case.arch,
                case.batch,
                case.size,
                dtype,
                device,
            )
            return training.step(name), lambda: training.own_bytes(name)
        from .classifiers import train_step

        networks = self._classifiers(case, [name])
        if name in networks.skipped:
            raise RuntimeError(networks.skipped[name])
        network = networks.built[name]
        optimizer = torch.optim.AdamW(network.parameters())
        step = train_step(
            network, optimizer, self._images(case), DTYPES[dtype].autocast
        )
        return step, lambda: own_bytes(network) + state_bytes(optimizer)


@contextlib.contextmanager
def _tf32(device: str) -> Iterator[None]:
    """fp32 products and convolutions as the paper had them on its A100: in TF32
    where the GPU has it. Shapes are fixed, so cuDNN may choose by trying."""
    if device == 'cpu':
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def meaning_of_fp32(device: str) -> str:
    """What fp32 rows are computed in, in a few words."""
    if device == 'cpu':
        return 'plain fp32: a CPU has no TF32'
    if torch.cuda.get_device_capability() >= (8, 0):
        return 'TF32'
    return 'plain fp32: this GPU has no TF32'


def _why_not(step: Step) -> str | None:
    """Why a step cannot be run, if so."""
    try:
        step.run()
        step.reset()
    except Exception as error:  # whatever a network or driver may raise
        reason = one_line(error)
        _free()
        return reason
    return None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(PEER_MODULES[name])
    except Exception as reason:  # that of what it imports, too
        return one_line(reason)
    return None


def _missing(reason: str) -> dict[str, str]:
    kind = reason.split(':')[0]
    if kind in ('ModuleNotFoundError', 'ImportError'):
        status = NOT_INSTALLED
    elif kind in ('OutOfMemoryError', 'MemoryError') or "can't allocate" in reason:
        status = OUT_OF_MEMORY
    else:
        status = FAILED
    return dict(status=status, reason=reason)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_paper(settings: PaperSettings, out: Path, command: str) -> dict:
    """Measures what ``out`` does not hold yet, writing it after each dtype of a
    row; progress goes to stderr.

    Args:
        settings: What to measure.
        out: The json file; one of an earlier run, on the same machine with the same
            versions and settings, is continued.
        command: That repeats it, for the file.

    Returns:
        What the file holds.

    Raises:
        ConfigError: ``out`` is something else, or of another machine, other
            versions or settings.
        SystemExit: One of ours gives something else than plain PyTorch.
    """
    torch.set_num_threads(settings.threads)
    result = _begun(settings, out)
    if command not in result['commands']:
        result['commands'].append(command)
    # What failed is tried again, together with what took turns with it.
    again = {_key(row) for row in result['rows'] if not _is_whole(row)}
    result['rows'] = [row for row in result['rows'] if _key(row) not in again]
    done = {_key(row) for row in result['rows']}
    todo = []
    for case in settings.cases():
        key = (case.title, case.quantity, case.batch)
        if left := tuple(dtype for dtype in case.dtypes if (*key, dtype) not in done):
            todo.append(case._replace(dtypes=left))
    bench = PaperBench(settings)
    columns = (
        '{task.description}',
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('', total=sum(len(case.dtypes) for case in todo))
        for case in todo:
            progress.update(task, description=f'{case.block}: {case.title}')
            for rows in bench.rows(case):
                result['rows'] += rows
                write_text(out, json.dumps(result, indent=1) + '\n')
                progress.advance(task)
            _free()
    return result


def _key(row: dict[str, Any]) -> tuple:
    return row['row'], row['quantity'], row['batch'], row['dtype']


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether it has its figure, or a reason for none that stays."""
    if 'status' in row:
        return row['status'] in (NOT_MEASURABLE, NOT_INSTALLED, OUT_OF_MEMORY)
    value = row.get(row['quantity'])
    return isinstance(value, (int, float)) and math.isfinite(value)


def _begun(settings: PaperSettings, out: Path) -> dict[str, Any]:
    """The result so far, or one without rows."""
    if not out.parent.is_dir():
        raise ConfigError(f'--out {out}: there is no folder {out.parent}; make it')
    facts: dict[str, Any] = json.loads(  # with lists for tuples, as read back
        json.dumps(
            dict(
                kind=published.PAPER_KIND,
                source=published.SOURCE,
                machine=machine(settings.device),
                versions={'convnext_mm': __version__, **versions()},
                settings=settings.shared(),
                fp32=meaning_of_fp32(settings.device),
                conditions=published.CONDITIONS,
                commands=[],
                rows=[],
            )
        )
    )
    del facts['machine']['load_average']  # each row has its own
    if not out.exists():
        return facts
    try:
        result = json.loads(out.read_text())
        is_ours = (
            result['kind'] == published.PAPER_KIND
            and all(isinstance(result[part], type(facts[part])) for part in facts)
            and all(_key(row) and row['network'] for row in result['rows'])
        )
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f'--out {out}: the file exists and holds no tables of --paper; name '
            'another, or delete it'
        )
    for part in ('machine', 'versions', 'settings'):
        here, there = facts[part], result[part]
        for key in {**here, **there}:
            if here.get(key) != there.get(key):
                raise ConfigError(
                    f'--out {out}: was measured with {key} {there.get(key)}, and now '
                    f'{key} is {here.get(key)}. Rows of both do not belong into one '
                    'table: name another file, or delete it to measure anew'
                )
    return result
