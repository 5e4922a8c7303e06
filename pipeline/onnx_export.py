"""One half of a network as ONNX bytes that depend on the network alone: no path, no counter, no version of the exporter in them."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
import torch
from onnx import GraphProto, ModelProto
from torch import Tensor, nn

from pipeline.errors import ModelError

OPSET = 20
MAX_WEIGHTS_BYTES = 2_000_000_000  # protobuf ends at 2 GiB

# The sort of a codebook's values stays a node, which ONNX Runtime folds as it loads the half; each export would warn of it.
logging.getLogger("onnxscript.optimizer._constant_folding").addFilter(lambda record: not str(record.msg).startswith("Skipping constant folding for op"))


def export_onnx(module: nn.Module, example: Tensor, *, input_name: str, output_name: str) -> bytes:
    """Export `module` in evaluation mode, weights inside, with a free batch dimension; `module` itself is left alone.

    Args:
        example: (B, ...) input of the dtype the half takes; only its shape without the batch, and its dtype, matter.
        input_name, output_name: names of the graph's input and output, for example `image` and `symbols`.

    Returns:
        A checked ONNX model of opset `OPSET`, stripped of what the exporter says about itself and its machine (DESIGN 3).

    Raises:
        ModelError: the half cannot be exported, does not allow other batch sizes, or has weights of more than 2 GB.
    """
    return canonical_bytes(export_model(module, example, input_name=input_name, output_names=[output_name]))


def export_model(module: nn.Module, example: Tensor, *, input_name: str, output_names: Sequence[str]) -> ModelProto:
    """Export `module`, which may have several results, as `export_onnx` does; what the exporter says about itself is still in it.

    Raises:
        ModelError: see `export_onnx`.
    """
    what = f"the half from {input_name} to {', '.join(output_names[:3])}"
    weights_bytes = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    if weights_bytes > MAX_WEIGHTS_BYTES:
        raise ModelError(f"{what} has {weights_bytes / 1e9:.1f} GB of weights, an ONNX file holds 2; choose a smaller backbone.")
    half = copy.deepcopy(module).eval()
    two = torch.cat([example[:1], example[:1]])  # the exporter takes a batch of one for a constant
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                half,
                (two,),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),
                input_names=[input_name],
                output_names=list(output_names),
                opset_version=OPSET,
                external_data=False,
                optimize=True,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{what} cannot be exported to ONNX ({reason}); choose another cut or backbone.") from error
    assert program is not None
    return program.model_proto


def canonical_bytes(model: ModelProto) -> bytes:
    """`model`, checked, without what varies between exporters, folders and runs, and with nodes numbered by their place."""
    model.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.producer_name = "coinfer"
    model.ClearField("producer_version")
    model.ClearField("model_version")
    _strip_graph(model.graph)
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        _strip(function.value_info)
        _strip_nodes(function.node)
    data: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data


def _strip_graph(graph: GraphProto) -> None:
    graph.ClearField("doc_string")
    graph.ClearField("metadata_props")
    graph.ClearField("value_info")  # any reader infers it again
    for items in (graph.input, graph.output, graph.initializer):
        _strip(items)
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for index, node in enumerate(nodes):
        node.name = f"{node.op_type}_{index}"  # the exporter numbers them by a counter of its passes
        _strip([node])
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for graph in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                _strip_graph(graph)


def _strip(items: Iterable[Any]) -> None:
    for item in items:
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
