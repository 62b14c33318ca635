"""What the arguments of a network may be.

Each function gives the value back as the network uses it, or raises a TypeError
or ValueError that names the argument, the value and what is allowed.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any

from convnext_mm.archs import ARCHS, NUM_STAGES, Arch

OUTPUT_STRIDES = (8, 16, 32)
# What mmpretrain's ConvNeXt has and this one does not vary: its defaults.
MMPRETRAIN_DEFAULTS = dict(
    norm_cfg=dict(type='LN2d', eps=1e-6), act_cfg=dict(type='GELU'), linear_pw_conv=True
)


def number(name: str, value: float) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number, got {value!r}')
    if not math.isfinite(value):
        raise ValueError(f'{name} must be finite, got {value!r}')
    return value


def integer(name: str, value: int, lowest: int, highest: int | None = None) -> int:
    """An integer in a range, its ends included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < lowest or (highest is not None and value > highest):
        allowed = (
            f'at least {lowest}' if highest is None else f'in [{lowest}, {highest}]'
        )
        raise ValueError(f'{name} must be {allowed}, got {value}')
    return int(value)


def flag(name: str, value: bool) -> bool:
    """True or False, and no word that would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')
    return value


def one_of(name: str, value: str, allowed: Collection[str]) -> str:
    """One of some names."""
    if value not in allowed:
        raise ValueError(f'{name} must be one of {tuple(allowed)}, got {value!r}')
    return value


def check_numbers(
    kernel_size: int,
    mlp_ratio: float,
    fewest_channels: int,
    norm_eps: float,
    layer_scale_init_value: float,
) -> None:
    """What every block is built with."""
    if integer('kernel_size', kernel_size, 1) % 2 == 0:
        raise ValueError(f'kernel_size must be odd (3, 5, 7, ...), got {kernel_size}')
    if number('mlp_ratio', mlp_ratio) * fewest_channels < 1:
        raise ValueError(
            'mlp_ratio must be above 0 and give at least one hidden channel, got '
            f'{mlp_ratio}'
        )
    if number('norm_eps', norm_eps) <= 0:
        raise ValueError(f'norm_eps must be above 0, got {norm_eps}')
    number('layer_scale_init_value', layer_scale_init_value)


def check_drop_path_rate(drop_path_rate: float) -> None:
    """Stochastic depth of the last block."""
    if not 0 <= number('drop_path_rate', drop_path_rate) < 1:
        raise ValueError(
            'drop_path_rate must be in [0, 1): the share of samples that skip the '
            f'last block, got {drop_path_rate}'
        )


def parse_arch(arch: str | dict) -> Arch:
    """A published architecture by name, or one of these depths and channels."""
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'unknown arch {arch!r}; one of {tuple(ARCHS)}, or '
                'dict(depths=[...], channels=[...])'
            )
        return ARCHS[arch]
    if not isinstance(arch, dict):
        raise TypeError(
            f'arch must be a name or dict(depths=[...], channels=[...]), got {arch!r}'
        )
    if set(arch) not in ({'depths', 'channels'}, {'depths', 'dims'}):
        raise ValueError(
            'an arch dict has the keys depths and channels (or '
            f'dims), got {tuple(arch)}'
        )
    spec: dict[str, Any] = {}
    for key, value in arch.items():
        if not isinstance(value, Sequence) or len(value) != NUM_STAGES:
            raise ValueError(
                f'arch[{key!r}] must hold {NUM_STAGES} integers, '
                f'one for each stage, got {value!r}'
            )
        spec['channels' if key == 'dims' else key] = tuple(
            integer(f'arch[{key!r}][{i}]', v, 1) for i, v in enumerate(value)
        )
    return Arch(**spec)


def parse_out_indices(
    out_indices: int | Sequence[int], num_stages: int = NUM_STAGES
) -> tuple[int, ...]:
    """Stages in ascending order, none negative."""
    given = out_indices if isinstance(out_indices, Sequence) else [out_indices]
    stages = [
        integer('out_indices', i, -num_stages, num_stages - 1) % num_stages
        for i in given
    ]
    if not stages or len(set(stages)) < len(stages):
        raise ValueError(
            'out_indices must name at least one stage and none '
            f'twice, got {out_indices!r}'
        )
    return tuple(sorted(stages))


def parse_output_stride(output_stride: int, stem_patch_size: int) -> int:
    """One that the stem allows."""
    integer('output_stride', output_stride, 1)
    if output_stride not in OUTPUT_STRIDES:
        raise ValueError(
            f'output_stride must be one of {OUTPUT_STRIDES}, got {output_stride}'
        )
    if output_stride != 32 and output_stride < stem_patch_size:
        raise ValueError(
            f'output_stride={output_stride} is below the stride of the stem, '
            f'stem_patch_size={stem_patch_size}: raise output_stride or lower '
            'stem_patch_size'
        )
    return int(output_stride)


def check_mmpretrain_defaults(**settings: Any) -> None:
    """Refuses what mmpretrain's ConvNeXt can vary and this one cannot."""
    for name, value in settings.items():
        default = MMPRETRAIN_DEFAULTS[name]
        if value not in (None, default):
            raise ValueError(
                f'{name}={value!r} is not supported: it is accepted at '
                f"mmpretrain's default, {default!r}, only; leave it out"
            )
