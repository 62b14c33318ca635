"""The doors, and the way of one checkpoint through the room:

address -> :func:`.remote.fetch` -> :func:`.reader.read_checkpoint` ->
:func:`.convert.convert` -> :func:`.convert.complete`, for a state dict, or
:func:`.fit.fit`, for a backbone's parameters.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .convert import Report, complete, convert, flatten
from .errors import NoWeightsError, naming, shown, summarise
from .families import choose, recognise
from .fit import fill, fit
from .reader import check_format, read_checkpoint
from .remote import fetch

Source = str | os.PathLike


class Findings(Protocol):
    """What the log says of a checkpoint, see :class:`.convert.Report`."""

    used: dict[str, str]
    leftovers: dict[str, list[str]]
    not_finite: list[str]

    def headline(self) -> str: ...


Fitted = tuple[dict[str, Tensor], Findings]


def load_checkpoint(
    source: Source, prefix: str | None = None, trust_pickle: bool = False
) -> dict[str, Tensor]:
    """Reads the ConvNeXt of any known checkpoint, safely.

    Args:
        source: A file, ``https://...``, ``hf://org/name[/file]`` or
            ``timm://name``.
        prefix: Which network, where the checkpoint holds several.
        trust_pickle: Vouch for a file you made yourself: its pickle is
            executed, whatever it holds.

    Returns:
        State dict of :class:`convnext_mm.ConvNeXt`, complete; output norms only
        where the checkpoint has them, a classifier's final norm not.

    Raises:
        CheckpointError: The message says what is wrong and what to do.

    Examples:
        >>> state_dict = load_checkpoint('convnext_tiny_22k_224.pth')
    """
    state, report = read_network(source, prefix, trust_pickle)
    _log_findings(source, report)
    return state


def read_network(
    source: Source, prefix: str | None = None, trust_pickle: bool = False
) -> tuple[dict[str, Tensor], Report]:
    """As :func:`load_checkpoint`, with the report and without a line in the
    log."""
    checkpoint = read_checkpoint(fetch(source), trust_pickle)
    with naming(source):
        state, report = convert(checkpoint, prefix)
        return complete(state, report), report


def read_beside(source: Source) -> dict[str, Tensor]:
    """The tensors that lie where the ConvNeXt of a checkpoint does, by their
    names without its prefix: ``head.weight`` of a classifier.

    Raises:
        CheckpointError: It cannot be read, or has no ConvNeXt, or several.
    """
    checkpoint = read_checkpoint(fetch(source))
    with naming(source):
        tensors = flatten(checkpoint)
        prefix = choose(recognise(tensors), None)[0].prefix
    return {
        key[len(prefix) :]: tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def convert_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Gives the ConvNeXt in a loaded checkpoint our names and shapes.

    Args:
        state_dict: A state dict of any known family, wrapped or not.

    Returns:
        The complete state dict of :class:`convnext_mm.ConvNeXt`, as
        :func:`load_checkpoint` gives it, and the name of the family.

    Raises:
        CheckpointError: No ConvNeXt, several, or an incomplete one.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            'state_dict must be a dictionary of tensors, got '
            f'{type(state_dict).__name__}'
        )
    state, report = convert(state_dict)
    state = complete(state, report)
    _log_findings('the state dict', report)
    return state, report.family.name


def check_source(source: Source) -> None:
    """Looks at a local checkpoint before anything is built for it; an address
    is not asked.

    Raises:
        CheckpointFileError: There is no such file, or it is no checkpoint.
    """
    if '://' not in str(source):
        check_format(source)


class AnyFamily(nn.Module):
    """A backbone that takes the weights of any family: all, or none and a
    ``CheckpointError``. Reached from every way to load a model that holds it.

    Attributes:
        allow_partial (bool): Take what fits.
        gap_before_final_norm (bool): The last norm is of pooled features.
        num_stages (int): Of the network.
    """

    allow_partial: bool
    gap_before_final_norm: bool
    num_stages: int

    def fit_checkpoint(self, tensors: Mapping[str, Any], prefix: str | None) -> Fitted:
        """What of a checkpoint goes into which parameter and buffer, and what was
        found. Arguments as for :func:`.convert.convert`.

        Raises:
            CheckpointError: It does not fit.
        """
        state, report = convert(tensors, prefix)
        return fit(self, state, report), report

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        self._convert_part(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _convert_part(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Gives what of a whole model's state dict lies behind ``prefix`` our
        names, whichever family's it has, and checks that it is complete."""
        keys = [
            key for key in state_dict if isinstance(key, str) and key.startswith(prefix)
        ]
        if not keys and self.allow_partial:
            return
        part = {key[len(prefix) :]: state_dict[key] for key in keys}
        where = f' behind {prefix!r}' if prefix else ''
        with naming(f'the state dict{where}'):
            if not keys:
                raise NoWeightsError(
                    'there are no weights for the ConvNeXt (allow_partial=True on '
                    'it leaves it as it is)'
                )
            fitted, report = self.fit_checkpoint(part, None)
        if fitted.keys() <= part.keys() and all(
            name in fitted and _is_same(tensor, fitted[name])
            for name, tensor in part.items()
        ):
            return  # our own names
        for key in keys:
            del state_dict[key]
        state_dict.update({prefix + name: t for name, t in fitted.items()})
        _log_findings('the backbone', report)


def _is_same(tensor: Tensor, fitted: Tensor) -> bool:
    if tensor.shape != fitted.shape or tensor.dtype != fitted.dtype:
        return False
    return tensor.is_floating_point() or torch.equal(tensor, fitted)


def load_pretrained(
    backbone: AnyFamily, source: Source, prefix: str | None = None
) -> None:
    """Loads a checkpoint into a :class:`convnext_mm.ConvNeXt`: all that the
    backbone has, or nothing and an error.

    Args:
        backbone: The model; its ``allow_partial`` and
            ``gap_before_final_norm`` count.
        source: As for :func:`load_checkpoint`.
        prefix: Which network, where the checkpoint holds several.

    Raises:
        CheckpointError: It cannot be read, or does not fit.
    """
    checkpoint = read_checkpoint(fetch(source))
    with naming(source):
        fitted, report = backbone.fit_checkpoint(checkpoint, prefix)
        places = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
        floating = {n: p for n, p in places.items() if p.is_floating_point()}
        fill(floating, {name: fitted[name] for name in floating if name in fitted})
        for name in places.keys() - floating.keys():  # counters
            places[name].copy_(fitted[name])
    _log_findings(source, report)


def _log_findings(source: Source, report: Findings) -> None:
    """Logs what was found, what is left out, and names what is NaN or Inf."""
    print_log(
        f'Weights of {shown(source)}: {report.headline()}, {len(report.used)} tensors',
        logger='current',
    )
    if report.leftovers:
        kinds = '; '.join(
            f'{kind}: {summarise(keys)}' for kind, keys in report.leftovers.items()
        )
        print_log(f'Left out: {kinds}', logger='current')
    if report.not_finite:
        print_log(
            f'{len(report.not_finite)} weights hold NaN or Inf: '
            f'{summarise(report.not_finite, 10)}',
            logger='current',
            level=logging.WARNING,
        )
