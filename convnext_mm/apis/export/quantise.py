"""Weights and activations in eight bits, by ONNX Runtime."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

# The products; what stands between them stays in floating point.
OPERATORS = ['Conv', 'MatMul', 'Gemm']


def quantise(source: Path, target: Path, inputs: Sequence[Tensor]) -> None:
    """Writes an ONNX file whose products are of int8 weights, one scale for each
    channel, and uint8 activations, their ranges taken from examples (static
    quantisation, QDQ format).

    Args:
        source: In fp32.
        target: Of the file.
        inputs: Examples, as the network takes them.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Examples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[Tensor] = iter(inputs)

        def get_next(self) -> dict | None:
            x = next(self.left, None)
            return None if x is None else {'images': x.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, 'ready.onnx')
        # Symbolic inference does not know sizes that depend on values.
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            target,
            Examples(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
