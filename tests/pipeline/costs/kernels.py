"""Halves as ONNX Runtime really runs them, which what is foreseen of them is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from models.operations import Operation
from pipeline.costs.onnx_graph import exported, fold_batch_norms
from pipeline.costs.profiled import block_probe, channel_block


def profiled_session(model: bytes, runs: int = 1) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The model as ONNX Runtime optimises it, and the profile of `runs` runs of one input, with the options of `open_session`."""
    with TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        taken = session.get_inputs()[0]
        value = np.zeros((1, *taken.shape[1:]), np.float32 if "float" in taken.type else np.uint8)
        for _ in range(runs):
            session.run(None, {taken.name: value})
        events = json.loads(Path(session.end_profiling()).read_text())
        return onnx.load(options.optimized_model_filepath), events


@cache
def this_block() -> int:
    """The channel block of the machine that tests run on."""
    return channel_block(profiled_session(block_probe().SerializeToString())[0])


def narrowed(whole: bytes, operations: Sequence[Operation]) -> bytes:
    """An exported unpruned half with the widths of `operations`, those of a pruned one: exporting that would take seconds. The weights are noise."""
    model = onnx.load_from_string(whole)
    constants = {item.name: item for item in model.graph.initializer}
    layers = [node for node in fold_batch_norms(exported(operations)) if node.weights]
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "BatchNormalization")]
    random = np.random.default_rng(0)
    for node, layer in zip(nodes, layers, strict=True):
        for name, shape in zip(node.input[1:], (layer.weights, *[layer.weights[:1]] * 3), strict=False):
            constants[name].CopyFrom(numpy_helper.from_array(random.uniform(0.1, 0.2, shape).astype(np.float32), name))
        for attribute in node.attribute:
            if attribute.name == "group":
                attribute.i = layer.groups
    return bytes(model.SerializeToString())
