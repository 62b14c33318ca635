"""ConvNeXt backbones of this package and of others, with the same weights."""

import copy
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnext_mm.archs import ARCHS
from convnext_mm.checkpoint import convert_state_dict
from convnext_mm.models import ConvNeXt
from convnext_mm.models.block import IMPLEMENTATIONS, Block, sample_drop_scale
from convnext_mm.ops.define import counted_operators

# Where a peer's network is; the paper's formulation is written below.
PEER_MODULES = dict(
    mmpretrain='mmpretrain.models',
    timm='timm',
    torchvision='torchvision.models.convnext',
    transformers='transformers.models.convnext.modeling_convnext',
)
PEERS = ('paper', *PEER_MODULES)
OTHERS = ('resnet50', 'swin')  # no ConvNeXts, in whole models
DEPLOY = '+deploy'  # after switch_to_deploy()
GRAPHS = '+graphs'  # passes kept as CUDA graphs
COMPILED = ' compiled'
OURS = (*IMPLEMENTATIONS, 'auto', 'lean' + DEPLOY, 'triton' + DEPLOY, 'triton' + GRAPHS)
# Large enough for every parameter to show in the output.
LAYER_SCALE = 0.1
CHECK_SHAPE = (1, 3, 64, 96)
TOLERANCE = 1e-4
# What a network may differ by from plain PyTorch's in the dtype that it computes in,
# of the largest value: operators fused in another order round otherwise. fp32 is
# TF32 in the convolutions of a GPU, and as coarse as fp16.
COARSE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


class Paper(nn.Module):
    """The network as the paper's released code computes it: NCHW maps,
    permuted for the pointwise layers, LayerNorm of NCHW maps in separate
    steps. Parameters and drop path are those of a :class:`ConvNeXt`, or of an
    isotropic one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        x = centred / torch.sqrt(variance + norm.eps)
        return norm.weight[:, None, None] * x + norm.bias[:, None, None]

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        layers: Any
        stage: Any
        for i, (layers, stage) in enumerate(
            zip(self.model.downsample_layers, self.model.stages)
        ):
            for layer in layers:
                x = layer(x) if isinstance(layer, nn.Conv2d) else self.norm(x, layer)
            for block in stage:
                x = x + self._branch(x, block)
            if i in self.model.out_indices:
                norm = getattr(self.model, f'norm{i}')
                if self.model.gap_before_final_norm:
                    pooled = self.norm(x.mean((2, 3), keepdim=True), norm)
                    outs.append(pooled.flatten(1))
                else:
                    outs.append(self.norm(x, norm))
        return outs

    def _branch(self, x: Tensor, block: Any) -> Tensor:
        y = block.dwconv(x).permute(0, 2, 3, 1)
        y = block.pwconv2(F.gelu(block.pwconv1(block.norm(y))))
        if block.gamma is not None:
            y = block.gamma * y
        y = y.permute(0, 3, 1, 2)
        scale = sample_drop_scale(x, block.drop_path if self.training else 0)
        return y if scale is None else y * scale.to(y.dtype)[:, None, None, None]


class Peer(nn.Module):
    """Another library's network with our norms on the maps that it emits."""

    def __init__(
        self,
        network: nn.Module,
        features: Callable[[Any, Tensor], list[Tensor]],
        model: ConvNeXt,
    ) -> None:
        super().__init__()
        self.network, self.features = network, features
        self.norms: nn.ModuleList | None = None
        state, _ = convert_state_dict(network.state_dict())
        with torch.no_grad():  # writes through to the network's parameters
            for name, value in model.state_dict().items():
                if name in state:
                    state[name].copy_(value)
        if 'norm0.weight' not in state:
            self.norms = nn.ModuleList(
                copy.deepcopy(getattr(model, f'norm{i}')) for i in range(4)
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = self.features(self.network, x)
        if self.norms is None:
            return list(outs)
        return [norm(out) for norm, out in zip(self.norms, outs)]


def build_peer(name: str, arch: str, model: ConvNeXt) -> nn.Module:
    """A peer with the weights of ``model``.

    Raises:
        ImportError: Its library is not installed.
    """
    depths, channels = ARCHS[arch].depths, ARCHS[arch].channels
    if name == 'paper':
        return Paper(copy.deepcopy(model))
    library = importlib.import_module(PEER_MODULES[name])
    if name == 'mmpretrain':
        network = library.ConvNeXt(
            dict(depths=depths, channels=channels),
            out_indices=[0, 1, 2, 3],
            gap_before_final_norm=False,
        )
        return Peer(network, lambda net, x: net(x), model)
    if name == 'timm':
        network = library.create_model(
            'convnext_tiny', depths=depths, dims=channels, num_classes=0
        )
        return Peer(
            network,
            lambda net, x: net.forward_intermediates(x, intermediates_only=True),
            model,
        )
    if name == 'torchvision':
        network = library.ConvNeXt(
            [
                library.CNBlockConfig(*sizes)
                for sizes in zip(channels, (*channels[1:], None), depths)
            ]
        )

        def features(net: Any, x: Tensor) -> list[Tensor]:
            outs = []
            for layer in net.features:
                x = layer(x)
                outs.append(x)
            return outs[1::2]

        return Peer(network, features, model)
    network = library.ConvNextModel(
        library.ConvNextConfig(depths=depths, hidden_sizes=channels)
    )
    return Peer(
        network,
        lambda net, x: net(x, output_hidden_states=True).hidden_states[1:],
        model,
    )


class Networks(NamedTuple):
    """Networks by name, in one sentence each why others are missing, and plain
    PyTorch's with the same weights."""

    built: dict[str, nn.Module]
    skipped: dict[str, str]
    plain: nn.Module


def build(
    names: Sequence[str],
    arch: str,
    device: str,
    begin: Callable[[str], object] = lambda name: None,
) -> Networks:
    """Networks with the same weights, which were seen to give the same maps.

    One that is not installed, cannot be built or fails is skipped; a peer that
    gives other maps too.

    Args:
        begin: Is told which is next.

    Raises:
        SystemExit: One of ours gives other maps than eager.
    """
    torch.manual_seed(0)
    model = ConvNeXt(arch, layer_scale_init_value=LAYER_SCALE, impl='eager')

    def build_one(name: str) -> nn.Module:
        begin(name)
        if name in PEERS:
            return build_peer(name, arch, model)
        return build_ours(name, arch, model)

    return build_checked(names, build_one, model, device)


def build_checked(
    names: Sequence[str],
    build_one: Callable[[str], nn.Module],
    model: nn.Module,
    device: str,
) -> Networks:
    """Networks of these names, each seen to give what ``model`` gives.

    Args:
        build_one: A network with the weights of ``model``, by name.
        model: This package's network, in plain PyTorch.

    Raises:
        SystemExit: One of ours gives something else.
    """
    x = torch.rand(CHECK_SHAPE, device=device)
    plain = copy.deepcopy(model).to(device)
    expected = _maps(plain, x)
    networks = Networks({}, {}, plain)
    for name in names:
        try:
            network = build_one(name).to(device)
            error = difference(expected, _maps(network, x))
        except Exception as reason:  # whatever a library or driver may raise
            networks.skipped[name] = one_line(reason)
            continue
        if error < TOLERANCE:
            networks.built[name] = network
            continue
        message = (
            f'{name} and eager differ by {error:.1e} of the largest '
            f'value, more than {TOLERANCE:.0e}'
        )
        if name not in PEERS:
            raise SystemExit(f'error: {message}')
        networks.skipped[name] = message
    return networks


def build_ours(name: str, arch: str, model: ConvNeXt) -> ConvNeXt:
    network = ConvNeXt(
        arch,
        layer_scale_init_value=LAYER_SCALE,
        impl=name.removesuffix(DEPLOY).removesuffix(GRAPHS),
        cuda_graphs=4 if name.endswith(GRAPHS) else 0,
    )
    network.load_state_dict(model.state_dict())
    if name.endswith(DEPLOY):
        network.switch_to_deploy()
    return network


@torch.no_grad()
def _maps(network: nn.Module, x: Tensor) -> list[Tensor]:
    # Convolutions in TensorFloat-32 would differ by more than the tolerance.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return network.eval()(x)


def difference(expected: Sequence[Tensor], outs: Sequence[Tensor]) -> float:
    """The largest, of the largest value of its map; inf where one is NaN or
    maps are missing."""
    if len(outs) != len(expected):
        return float('inf')
    errors = [
        ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, outs)
    ]
    return max(e if e == e else float('inf') for e in errors)


def check_close(
    name: str, expected: Sequence[Tensor], outs: Sequence[Tensor], dtype: torch.dtype
) -> float:
    """The difference of a network, computed in ``dtype``, from plain PyTorch's.

    Raises:
        ArithmeticError: It is too large, or a value is not finite.
    """
    error = difference(expected, outs)
    if dtype == torch.float32 and outs[0].is_cuda:
        dtype = torch.float16
    allowed = COARSE_TOLERANCE[dtype]
    if not error < allowed:
        raise ArithmeticError(
            f'{name} differs by {error:.1e} of the largest value from plain PyTorch, '
            f'more than {allowed}'
        )
    return error


def one_line(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'[:300]


class Implementation(NamedTuple):
    """What ran where a network ran.

    Attributes:
        implementation: ``'triton'``, ``'lean'`` (``'lean+'`` too), or ``'plain'``
            where none of this package's operators did; several with ``'+'`` between.
        operators: How often each of them ran.
    """

    implementation: str
    operators: dict[str, int]


def what_runs(run: Callable[[], object]) -> Implementation:
    """Runs it once, and counts the operators of this package."""
    with counted_operators() as operators:
        run()
    kinds = sorted({name.partition('_')[0] for name in operators})
    return Implementation('+'.join(kinds) or 'plain', dict(operators))


def check_what_ran(name: str, network: nn.Module, ran: Implementation) -> None:
    """That a network of this name was computed as the name says.

    Raises:
        RuntimeError: Something else was, in some block at least.
    """
    name = name.removesuffix(COMPILED)
    wanted = name.removesuffix(DEPLOY).removesuffix(GRAPHS).removesuffix('+')
    if wanted == 'auto':
        return
    if wanted not in ('lean', 'triton'):
        wanted = 'plain'
    message = f'{name} was asked for, and {ran.implementation} ran: {ran.operators}'
    if ran.implementation != wanted:
        raise RuntimeError(message)
    if wanted == 'plain' or name == 'lean' + DEPLOY:  # no operator for a block
        return
    blocks = sum(isinstance(module, Block) for module in network.modules())
    others = re.compile('downsample|norm|backward')
    ran_blocks = sum(n for op, n in ran.operators.items() if not others.search(op))
    if ran_blocks < blocks:
        raise RuntimeError(f'{message}, of {blocks} blocks in {ran_blocks} only')
