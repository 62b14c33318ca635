"""Times ConvNeXt backbones side by side and writes one json file.

All networks run in this process, with the same weights (checked: their maps
must agree first), taking turns round after round, so that what else the machine
does hits all alike. Memory is what hooks see saved for backward, each memory
block once, parameters not counted.

    python tools/benchmark.py --mode train --dtype fp32 --out benchmarks/x.json
"""
import argparse
import copy
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm import ConvNeXt, convert_state_dict
from convnext_mm.archs import ARCHS

PEERS = ('paper', 'mmpretrain', 'timm', 'torchvision', 'transformers')
OURS = ('eager', 'lean', 'lean+', 'lean+deploy')
MODES = ('infer', 'train', 'memory')
DTYPES = ('fp32', 'amp', 'bf16')  # amp: bf16 autocast of fp32 weights
# The fewest values moved per channel, pixel and block (docs/performance.md).
LEAST_VALUES = dict(infer=18, train=59)


class Paper(nn.Module):
    """The network as the paper's released code computes it: NCHW maps,
    permuted for the pointwise layers, LayerNorm of NCHW maps in separate
    steps. Parameters are those of a :class:`ConvNeXt`."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        variance = centred.pow(2).mean(1, keepdim=True)
        x = centred / torch.sqrt(variance + norm.eps)
        return norm.weight[:, None, None] * x + norm.bias[:, None, None]

    def forward(self, x: Tensor) -> List[Tensor]:
        outs = []
        for i, stage in enumerate(self.model.stages):
            for layer in self.model.downsample_layers[i]:
                x = (layer(x) if isinstance(layer, nn.Conv2d) else self.norm(
                    x, layer))
            for block in stage:
                y = block.dwconv(x).permute(0, 2, 3, 1)
                y = block.pwconv2(F.gelu(block.pwconv1(block.norm(y))))
                x = x + (block.gamma * y).permute(0, 3, 1, 2)
            outs.append(self.norm(x, getattr(self.model, f'norm{i}')))
        return outs


class Peer(nn.Module):
    """Another library's network with our norms on the maps that it emits."""

    def __init__(self, network: nn.Module,
                 features: Callable[[nn.Module, Tensor], List[Tensor]],
                 model: ConvNeXt) -> None:
        super().__init__()
        self.network, self.features = network, features
        self.norms = None
        state, _ = convert_state_dict(network.state_dict())
        with torch.no_grad():  # writes through to the network's parameters
            for name, value in model.state_dict().items():
                if name in state:
                    state[name].copy_(value)
        if 'norm0.weight' not in state:
            self.norms = nn.ModuleList(
                copy.deepcopy(getattr(model, f'norm{i}')) for i in range(4))

    def forward(self, x: Tensor) -> List[Tensor]:
        outs = self.features(self.network, x)
        if self.norms is None:
            return list(outs)
        return [norm(out) for norm, out in zip(self.norms, outs)]


def build_peer(name: str, arch: str, model: ConvNeXt) -> nn.Module:
    """A peer with the weights of ``model``."""
    depths, channels = ARCHS[arch].depths, ARCHS[arch].channels
    if name == 'paper':
        return Paper(copy.deepcopy(model))
    if name == 'mmpretrain':
        from mmpretrain.models import ConvNeXt as Network
        network = Network(
            dict(depths=depths, channels=channels), out_indices=[0, 1, 2, 3],
            gap_before_final_norm=False)
        return Peer(network, lambda net, x: net(x), model)
    if name == 'timm':
        import timm
        network = timm.create_model(
            'convnext_tiny', depths=depths, dims=channels, num_classes=0)
        return Peer(network, lambda net, x: net.forward_intermediates(
            x, intermediates_only=True), model)
    if name == 'torchvision':
        from torchvision.models import convnext
        network = convnext.ConvNeXt([
            convnext.CNBlockConfig(*sizes)
            for sizes in zip(channels, (*channels[1:], None), depths)
        ])

        def features(net, x):
            outs = []
            for layer in net.features:
                x = layer(x)
                outs.append(x)
            return outs[1::2]

        return Peer(network, features, model)
    import transformers
    network = transformers.ConvNextModel(
        transformers.ConvNextConfig(depths=depths, hidden_sizes=channels))
    return Peer(
        network, lambda net, x: net(x, output_hidden_states=True)
        .hidden_states[1:], model)


def build(args: argparse.Namespace) -> Dict[str, nn.Module]:
    """Every network by name, all with the same weights."""
    torch.manual_seed(0)
    model = ConvNeXt(args.arch, layer_scale_init_value=0.1, impl='eager')
    networks = {}
    for name in args.networks:
        if name in PEERS:
            networks[name] = build_peer(name, args.arch, model)
            continue
        networks[name] = ConvNeXt(
            args.arch, impl=name.removesuffix('+deploy'),
            layer_scale_init_value=0.1)
        networks[name].load_state_dict(model.state_dict())
        if name.endswith('+deploy'):
            networks[name].switch_to_deploy()
    for name in [n for n in networks if n in args.compile]:
        networks[name + ' compiled'] = torch.compile(
            copy.deepcopy(networks[name]), dynamic=False)
    for network in networks.values():
        network.to(args.device)
    return networks


def check_equal(networks: Dict[str, nn.Module], device: str) -> None:
    """Refuses to compare networks that do not compute the same maps.

    Raises:
        SystemExit: Two differ by more than 1e-4 of the largest value.
    """
    x = torch.rand(1, 3, 64, 96, device=device)
    with torch.no_grad():
        results = {n: m.eval()(x) for n, m in networks.items()
                   if not n.endswith('compiled')}
    first, expected = next(iter(results.items()))
    for name, outs in results.items():
        for ours, theirs in zip(expected, outs, strict=True):
            error = (ours - theirs).abs().max() / ours.abs().max()
            if not error < 1e-4:
                raise SystemExit(f'{name} and {first} differ by {error:.1e}')


def saved_bytes(run: Callable[[], List[Tensor]], model: nn.Module) -> int:
    """Bytes saved for backward by a forward pass."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outs = run()
    del outs
    return sum(sizes.values())


class Bench:
    """One image batch, one device, one clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.x = torch.rand(args.batch, 3, *args.size, device=args.device)

    def forward(self, model: nn.Module, dtype: str) -> List[Tensor]:
        x = self.x.bfloat16() if dtype == 'bf16' else self.x
        with torch.autocast(self.args.device, torch.bfloat16,
                            enabled=dtype == 'amp'):
            return model(x)

    def clock(self) -> float:
        if self.args.device == 'cuda':
            torch.cuda.synchronize()
        return (time.process_time() if self.args.clock == 'cpu' else
                time.perf_counter())

    def once(self, model: nn.Module, mode: str, dtype: str) -> float:
        """Milliseconds of one pass."""
        if mode == 'infer':
            with torch.no_grad():
                start = self.clock()
                self.forward(model, dtype)
                return 1e3 * (self.clock() - start)
        start = self.clock()
        outs = self.forward(model, dtype)
        sum(y.float().mean() for y in outs).backward()
        elapsed = 1e3 * (self.clock() - start)
        model.zero_grad(set_to_none=True)
        return elapsed

    def times(self, networks: Dict[str, nn.Module], mode: str,
              dtype: str) -> List[dict]:
        """Rows of interleaved rounds, the first of which is warm-up."""
        times = {name: [] for name in networks}
        for index in range(self.args.rounds + 1):
            for name, model in networks.items():
                model.train(mode == 'train')
                elapsed = self.once(model, mode, dtype)
                if index:
                    times[name].append(elapsed)
        floor = self.floor(mode, dtype)
        rows = []
        for name, values in times.items():
            median = statistics.median(values)
            low, _, high = statistics.quantiles(values, n=4)
            row = dict(network=name, mode=mode, dtype=dtype, median_ms=median,
                       quartiles_ms=[low, high], times_ms=values,
                       floor_ms=floor, share_of_floor=floor / median)
            if self.args.device == 'cuda':
                row['peak_bytes'] = self.peak(networks[name], mode, dtype)
            rows.append(row)
        return rows

    def peak(self, model: nn.Module, mode: str, dtype: str) -> int:
        torch.cuda.reset_peak_memory_stats()
        self.once(model, mode, dtype)
        return torch.cuda.max_memory_allocated()

    def floor(self, mode: str, dtype: str) -> float:
        """Milliseconds no implementation can go below here: FLOPs over the
        measured matrix rate, or least bytes over the measured bandwidth."""
        arch = ARCHS[self.args.arch]
        with torch.device('meta'), FlopCounterMode(display=False) as counter:
            model = ConvNeXt(self.args.arch, impl='eager')
            model(torch.rand(self.x.shape))
        flops = counter.get_total_flops() * (3 if mode == 'train' else 1)
        pixels = self.x.numel() // 3
        maps = sum(d * c * pixels / 4**(i + 2)
                   for i, (d, c) in enumerate(zip(arch.depths, arch.channels)))
        torch_dtype = torch.float32 if dtype == 'fp32' else torch.bfloat16
        size = torch_dtype.itemsize
        return 1e3 * max(flops / self.rate(torch_dtype),
                         LEAST_VALUES[mode] * size * maps / self.bandwidth())

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a product at the device's best, oneDNN's where it is."""
        n = 2048 if self.args.device == 'cpu' else 8192
        a = torch.rand(n, n, device=self.args.device).to(dtype)
        products = [lambda: a @ a]
        if self.args.device == 'cpu' and hasattr(torch.ops.mkldnn,
                                                 '_linear_pointwise'):
            products.append(lambda: torch.ops.mkldnn._linear_pointwise(
                a, a, None, 'none', [], ''))
        return 2 * n**3 / min(map(self.best, products))

    def bandwidth(self) -> float:
        """Bytes/s of a copy, read and write."""
        a = torch.rand(2**26, device=self.args.device)
        b = torch.empty_like(a)
        return 2 * a.numel() * a.itemsize / self.best(lambda: b.copy_(a))

    def best(self, run: Callable) -> float:
        times = []
        for _ in range(4):
            start = self.clock()
            run()
            times.append(self.clock() - start)
        return min(times[1:])


def machine(args: argparse.Namespace) -> dict:
    """Where and with what a run was made."""
    cpu = platform.processor()
    if Path('/proc/cpuinfo').is_file():
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.split(': ')[1] for line in lines
                    if line.startswith('model name')), cpu)
    facts = dict(
        cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        load_average=os.getloadavg(), python=platform.python_version())
    if args.device == 'cuda':
        facts['gpu'] = torch.cuda.get_device_name()
    return facts


def versions() -> Dict[str, str]:
    found = {}
    for name in ('torch', 'timm', 'torchvision', 'transformers',
                 'onedl-mmpretrain', 'mmpretrain'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--mode', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=DTYPES)
    parser.add_argument('--arch', choices=ARCHS, default='tiny')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--size', type=int, nargs=2, default=(256, 256),
                        metavar=('H', 'W'))
    parser.add_argument(
        '--networks', nargs='+', default=[*PEERS, *OURS],
        choices=[*PEERS, *OURS],
        help="default: all; 'lean+deploy' is 'lean' after switch_to_deploy(), "
        'and takes part in inference only')
    parser.add_argument('--compile', nargs='+', default=[], metavar='NETWORK',
                        help='networks to add compiled for fixed shapes')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument(
        '--clock', choices=['wall', 'cpu'], default='wall',
        help='cpu: time spent computing, for one thread on a busy machine')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', required=True, metavar='FILE.json')
    args = parser.parse_args(argv)
    if args.clock == 'cpu' and (args.threads != 1 or args.device != 'cpu'):
        parser.error('--clock cpu needs --threads 1 and --device cpu')
    if args.rounds < 2:
        parser.error('--rounds must be at least 2')
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    networks = build(args)
    check_equal(networks, args.device)
    bench = Bench(args)
    before = machine(args)
    rows = []
    for dtype in args.dtype:
        if dtype == 'bf16':
            networks = {n: m.bfloat16() for n, m in networks.items()}
        trained = {n: m for n, m in networks.items()
                   if '+deploy' not in n}
        for mode in args.mode:
            if mode == 'memory':
                rows += [
                    dict(network=n, mode=mode, dtype=dtype,
                         saved_bytes=saved_bytes(
                             lambda: bench.forward(m, dtype), m))
                    for n, m in trained.items() if 'compiled' not in n]
            else:
                rows += bench.times(networks if mode == 'infer' else trained,
                                    mode, dtype)
    for row in rows:
        value = (f'{row["median_ms"]:8.1f} ms' if 'median_ms' in row else
                 f'{row["saved_bytes"] / 2**20:8.1f} MiB')
        print(f'{row["mode"]:7}{row["dtype"]:5}{row["network"]:20}{value}')
    command = shlex.join(['python', 'tools/benchmark.py',
                          *(argv or sys.argv[1:])])
    Path(args.out).write_text(json.dumps(dict(
        command=command, machine=before, load_average_after=os.getloadavg(),
        versions=versions(), clock=args.clock, arch=args.arch,
        batch=args.batch, size=list(args.size), rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    main()
