"""Writing a network for another program to run."""

import json
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnext_mm.apis.quiet import quiet
from convnext_mm.engine.errors import ConfigError

from .networks import Network

# Target to the ending of its files.
TARGETS = {'onnx': '.onnx', 'torch-export': '.pt2', 'torchscript': '.torchscript'}
# The first that PyTorch's exporter writes; with 20 GELU is one operator.
OLDEST_OPSET, OPSET = 18, 20
FACTS = 'convnext_mm.json'  # in a file of PyTorch; of ONNX metadata, without .json
# Larger files of ONNX keep weights in a file beside them: a limit of protobuf.
LARGEST = 1_900_000_000
# Small, sides unlike, and no map that a backbone or neck makes of it is 1 wide:
# exporters take a size of 1 for a constant.
EXAMPLE = 256, 320


def need(*packages: str) -> None:
    """
    Raises:
        ConfigError: One of the packages is not installed, or does not import.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ConfigError(
                f'{package} is needed for this and does not import ({error}): '
                'pip install onnx onnxruntime onnxscript'
            ) from None


def write(
    network: Network,
    to: str,
    path: Path,
    shape: tuple[int, int] | None,
    opset: int,
    facts: dict[str, Any],
) -> Counter[str]:
    """Writes a network to a file.

    Args:
        network: Of :func:`.build.network_for`.
        to: One of ``TARGETS``.
        path: Of the file.
        shape: Height and width, where they are fixed.
        opset: Version of ONNX's operators.
        facts: Stored in the file, for whoever runs it.

    Returns:
        Its operators, and how many of each.
    """
    batch = 2 if network.batch else 1
    images = torch.rand(batch, network.channels, *(shape or EXAMPLE))
    with torch.no_grad(), quiet():
        if to == 'torchscript':
            return _torchscript(network, images, path, facts)
        program = _program(network, images, shape is not None)
        if to == 'torch-export':
            program.example_inputs = None  # the file would hold them
            torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})
            return Counter(
                str(node.target)
                for node in program.graph.nodes
                if node.op == 'call_function'
            )
        return _onnx(program, network, path, opset, facts)


def _program(network: Network, images: Tensor, is_fixed: bool) -> Any:
    """A graph of PyTorch's operators."""
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {} if is_fixed else {2: dynamic, 3: dynamic}
    if network.batch:
        sizes = {0: dynamic, **sizes}
    # strict=True would read the Python code of MMEngine too.
    return torch.export.export(
        network, (images,), dynamic_shapes=(sizes,), strict=False
    )


def _torchscript(
    network: Network, images: Tensor, path: Path, facts: dict[str, Any]
) -> Counter[str]:
    script = torch.jit.trace(network, (images,), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(script, path, _extra_files={FACTS: json.dumps(facts)})
    nodes = script.inlined_graph.nodes()
    return Counter(n.kind() for n in nodes if not n.kind().startswith('prim::'))


def _onnx(
    program: Any, network: Network, path: Path, opset: int, facts: dict[str, Any]
) -> Counter[str]:
    import onnx

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=['images'],
        output_names=list(network.outputs),
        verbose=False,
    )
    assert exported is not None  # as with dynamo=True
    model = exported.model_proto
    _name_sizes(model.graph)
    model.metadata_props.add(key=Path(FACTS).stem, value=json.dumps(facts))
    beside = path.name + '.data'
    (path.parent / beside).unlink(missing_ok=True)  # ONNX would append to it
    is_large = model.ByteSize() > LARGEST
    onnx.save(model, path, save_as_external_data=is_large, location=beside)
    return Counter(node.op_type for node in model.graph.node)


def _name_sizes(graph: Any) -> None:
    """Gives the exporter's numbered sizes their names."""
    (images,) = graph.input
    sizes = images.type.tensor_type.shape.dim
    names = {
        size.dim_param: name
        for size, name in zip(sizes, ('batch', '', 'height', 'width'))
        if size.dim_param
    }
    for value in (*graph.input, *graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(
                    r'\w+', lambda m: names.get(m[0], m[0]), size.dim_param
                )
