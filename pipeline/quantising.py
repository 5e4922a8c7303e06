"""The device half in 8-bit integers: ONNX Runtime's static quantisation, weights per channel, activations by what calibration images show."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static

from pipeline.errors import ModelError
from pipeline.onnx_export import canonical_bytes

LAYERS = {"Conv", "Gemm", "MatMul"}


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Iterable[NDArray[np.float32]]) -> None:
        self.feeds = ({name: batch} for batch in batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self.feeds, None)


def quantise(model: bytes, batches: Iterable[NDArray[np.float32]]) -> bytes:
    """`model`, a device half (float32 images -> symbols), with its layers in int8; the encoder's last one and the rounding stay float32.

    Args:
        batches: calibration images, float32 (B, 3, S, S), as preprocessing gives them.

    Raises:
        ModelError: there is no calibration image, or ONNX Runtime cannot quantise the model.
    """
    filled = (batch for batch in batches if len(batch))
    first = next(filled, None)
    if first is None:
        raise ModelError("calibration of the int8 device half got no image; check data.path and data.validation_fraction in params.yaml.")
    images = _Images(onnx.load_from_string(model).graph.input[0].name, itertools.chain([first], filled))
    with tempfile.TemporaryDirectory(prefix="coinfer-") as folder:
        given, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "int8"))
        given.write_bytes(model)
        try:
            # Folds batch norms into convolutions, without which they would stay float32 in between. A model given in
            # memory loses its constants there, and a reduction over axes that are constants then fails.
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                quantised,
                images,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                # 7 bits a weight: on x86 without VNNI products of 8-bit weights are summed in 16 bits, which saturate: another processor answers otherwise
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=_nodes(onnx.load(prepared).graph),
            )
        except Exception as error:  # it raises many unrelated kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"the device half cannot be quantised to int8 ({reason}); set search.precision to [fp32].") from error
        return canonical_bytes(onnx.load(quantised))


def _nodes(graph: onnx.GraphProto) -> list[str]:
    """Names of the layers but the last, and of what joins or passes on their integers."""
    constants = {item.name for item in graph.initializer}
    layers = [node.name for node in graph.node if node.op_type in LAYERS]
    joins = [node.name for node in graph.node if node.op_type in ("Add", "Concat", "Mul") and not constants & set(node.input)]
    passes = [node.name for node in graph.node if node.op_type in ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool")]
    # ReLU6; the encoder's own bound comes after the last layer
    clips = [node.name for node in itertools.takewhile(lambda node: node.name not in layers[-1:], graph.node) if node.op_type == "Clip"]
    return [*layers[:-1], *joins, *passes, *clips]
