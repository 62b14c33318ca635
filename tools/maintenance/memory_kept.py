"""What a ConvNeXt block keeps for its backward pass, tensor by tensor, measured on a
CPU; part of make_gallery.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm import ConvNeXt
from convnext_mm.analysis.machine import machine, versions
from convnext_mm.apis.show.output import save
from convnext_mm.models.block import Block

DTYPES = {'fp32': False, 'bf16 autocast': True}  # whether autocast is on


class Way(NamedTuple):
    """A way to run a block: its ``impl`` and ``with_cp``, and the way that keeps all
    that this one computes again."""

    impl: str
    with_cp: bool = False
    keeps_all: str | None = None


WAYS = {
    'eager': Way('eager'),
    'lean': Way('lean'),
    'lean+': Way('lean+', keeps_all='lean'),
    'lean, with_cp': Way('lean', with_cp=True, keeps_all='lean'),
}
# Operator and number of its output, as a block's forward pass calls them, to the name
# of the tensor. An operator that is called twice is told apart by the width.
TENSORS = {
    ('convolution', 0): 'depthwise output',
    ('native_layer_norm', 0): 'normalised',
    ('native_layer_norm', 1): 'statistics',
    ('native_layer_norm', 2): 'statistics',
    ('addmm', 0): 'pre-activation',
    ('gelu', 0): "GELU's output",
    ('lean_forward', 1): 'block input',
    ('lean_forward', 2): 'depthwise output',
    ('lean_forward', 3): 'pre-activation',
}
COLOURS = {
    'block input': '#5f6b7a',
    'depthwise output': '#3d6fc2',
    'normalised': '#8a62b5',
    'pre-activation': '#c2543d',
    "GELU's output": '#c99a2e',
    'last activation': '#4f9a57',
    'statistics': '#333333',
    'blocks': '#c2543d',
    'weights in bf16': '#d77fa8',
    'other layers': '#5f6b7a',
}
DIGIT = 0.02  # width of a digit, as a share of the longest bar
CENTRED = dict(ha='center', va='center', fontsize=13)
COMMAND = 'python tools/maintenance/make_gallery.py --measure --only memory_block'


class _Origins(TorchDispatchMode):
    """Notes which operator wrote each memory block, and for which weight."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.weights = weights
        self.found: dict[int, tuple[str, int, bool]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        inputs = {_address(arg) for arg in args if isinstance(arg, Tensor)}
        name = function.overloadpacket.__name__
        for number, output in enumerate(
            outputs if isinstance(outputs, (tuple, list)) else [outputs]
        ):
            # What shares memory with an input is a view of it.
            if isinstance(output, Tensor) and _address(output) not in inputs:
                of_weight = name == '_to_copy' and bool(inputs & self.weights)
                self.found[_address(output)] = name, number, of_weight
        return outputs


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_by_name(
    run: Callable[[], object], model: nn.Module, channels: int | None = None
) -> dict[str, int]:
    """Bytes that ``run`` keeps for backward, each memory block once, those of
    parameters not counted.

    Args:
        run: A forward pass.
        model: Whose parameters are not counted.
        channels: C of the one block that runs. None: a whole backbone runs.

    Returns:
        Tensor, or kind of layer, to bytes. The sum is that of
        :func:`convnext_mm.analysis.meter.saved_bytes`.
    """
    weights = {_address(p) for p in model.parameters()}
    origins = _Origins(weights)
    sizes: dict[int, tuple[str, int]] = {}
    inside = [channels is not None]

    def pack(tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in weights and tensor.numel():
            origin = origins.found.get(address)
            name = _name(origin, tensor, channels) if inside[0] else 'other layers'
            if origin and origin[2]:
                name = 'weights in bf16'
            sizes.setdefault(address, (name, tensor.untyped_storage().nbytes()))
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _flag_blocks(model, inside), hooks, origins:
        outputs = run()
    del outputs
    found: dict[str, int] = {}
    for name, size in sizes.values():
        found[name] = found.get(name, 0) + size
    return found


@contextmanager
def _flag_blocks(model: nn.Module, inside: list[bool]) -> Iterator[None]:
    """Sets the flag while one of a backbone's blocks runs."""

    def enter(*args: Any) -> None:
        inside[0] = True

    def leave(*args: Any) -> None:
        inside[0] = False

    blocks = [m for m in model.modules() if isinstance(m, Block) and m is not model]
    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    yield
    for handle in handles:
        handle.remove()


def _name(
    origin: tuple[str, int, bool] | None, tensor: Tensor, channels: int | None
) -> str:
    if channels is None:
        return 'blocks'
    name = TENSORS.get(origin[:2]) if origin else None
    if name == 'pre-activation' and tensor.shape[-1] == channels:
        return 'last activation'
    return name or 'block input'  # given, or its copy in another dtype


def measure(
    map_shape: Sequence[int] = (2, 96, 56, 56),
    arch: str = 'tiny',
    images_shape: Sequence[int] = (2, 3, 256, 256),
) -> dict[str, Any]:
    """Measures one block, and a whole backbone, in every way and dtype.

    Args:
        map_shape: Of the block's input, (N, C, H, W).
        arch: Of the backbone.
        images_shape: Of its input, (N, 3, H, W).

    Returns:
        ``block``: rows with ``bytes`` for a pixel and channel by tensor, and
        ``recomputed_flops`` for a pixel and channel. ``backbone``: rows with
        ``bytes`` by kind of layer.
    """
    torch.manual_seed(0)
    x = torch.randn(*map_shape).to(memory_format=torch.channels_last)
    x.requires_grad_()
    flops = {name: _flops(_block(way, x), x) for name, way in WAYS.items()}
    ways = [(dtype, name) for dtype in DTYPES for name in WAYS]
    return dict(
        command=COMMAND,
        machine=machine(),
        versions=versions(),
        map=map_shape,
        forward_flops=flops['lean'][0] / x.numel(),
        block=[_block_row(dtype, name, x, flops) for dtype, name in ways],
        arch=arch,
        images=images_shape,
        backbone=[_backbone_row(*way, arch, images_shape) for way in ways],
    )


def _block_row(
    dtype: str, name: str, x: Tensor, flops: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    block = _block(WAYS[name], x)
    kept = kept_by_name(_forward(block, x, dtype), block, x.shape[1])
    keeps_all = WAYS[name].keeps_all
    again = flops[name][1] - flops[keeps_all][1] if keeps_all else 0
    return dict(
        way=name,
        dtype=dtype,
        bytes={tensor: size / x.numel() for tensor, size in kept.items()},
        recomputed_flops=again / x.numel(),
    )


def _backbone_row(
    dtype: str, name: str, arch: str, shape: Sequence[int]
) -> dict[str, Any]:
    way = WAYS[name]
    network = ConvNeXt(
        arch,
        out_indices=(0, 1, 2, 3),
        layer_scale_init_value=1.0,
        impl=way.impl,
        with_cp=way.with_cp,
    ).train()
    kept = kept_by_name(_forward(network, torch.randn(*shape), dtype), network)
    return dict(way=name, dtype=dtype, bytes=kept)


def _block(way: Way, x: Tensor) -> Block:
    return Block(
        x.shape[1], impl=way.impl, with_cp=way.with_cp, layer_scale_init_value=1.0
    )


def _forward(network: nn.Module, x: Tensor, dtype: str) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast('cpu', torch.bfloat16, enabled=DTYPES[dtype]):
            return network(x)

    return run


def _flops(block: Block, x: Tensor) -> tuple[int, int]:
    """Of a block's matrix products and convolution, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        out = block(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def draw_block(result: dict[str, Any], path: Path) -> Path:
    """Draws what one block keeps, by tensor, in bytes for each pixel and channel.

    Args:
        result: Of :func:`measure`.
        path: PNG to write.
    """
    title = 'One block, {}: bytes kept for each pixel and channel'
    return _draw(result['block'], 1, title, '{:.3g}', path)


def draw_backbone(result: dict[str, Any], path: Path) -> Path:
    """Draws what a backbone keeps, by kind of layer, in MiB.

    Args:
        result: Of :func:`measure`.
        path: PNG to write.
    """
    count, _, height, width = result['images']
    title = (
        f'ConvNeXt-{result["arch"]}, {count} images of {height} x {width}, {{}}: MiB'
    )
    return _draw(result['backbone'], 2**-20, title, '{:.0f}', path)


def _draw(
    rows: list[dict[str, Any]], unit: float, title: str, form: str, path: Path
) -> Path:
    figure = Figure(figsize=(8.6, 6.4), layout='constrained')
    axes = figure.subplots(len(DTYPES), 1, sharex=True)
    longest = unit * max(sum(row['bytes'].values()) for row in rows)
    for axis, dtype in zip(axes, DTYPES):
        of_dtype = [row for row in rows if row['dtype'] == dtype]
        whole = unit * sum(of_dtype[0]['bytes'].values())
        for row in of_dtype:
            start = 0.0
            for name in (key for key in COLOURS if key in row['bytes']):
                value = unit * row['bytes'][name]
                colour = COLOURS[name]
                axis.barh(row['way'], value, left=start, color=colour, label=name)
                text = form.format(value)
                if value > len(text) * DIGIT * longest:
                    middle = start + value / 2, row['way']
                    axis.annotate(text, middle, color='white', **CENTRED)
                start += value
            axis.annotate(
                f' {form.format(start)} ({start / whole:.0%})',
                (start, row['way']),
                va='center',
                fontsize=14,
            )
        axis.invert_yaxis()
        axis.set_title(title.format(dtype), fontsize=15)
        axis.set_xlim(0, 1.22 * longest)
        axis.set_xticks([])
        axis.tick_params(labelsize=14, length=0)
        axis.spines[['top', 'right', 'bottom']].set_visible(False)
    handles = {bars.get_label(): bars for axis in axes for bars in axis.containers}
    names = [name for name in COLOURS if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc='outside lower center',
        ncols=3,
        frameon=False,
        fontsize=14,
    )
    return save(figure, path)
