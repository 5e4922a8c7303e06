"""The Open Inference Protocol (KServe v2) over gRPC: its messages, and how a bundle's edge half appears in it.

The messages are declared here, with the names and field numbers of the published `open_inference_grpc.proto`; field numbers are what crosses the wire.

A bundle is the model `coinfer-ID`, ID its id in 8 hex digits, version "1": input `frame`, BYTES [N, 1], each element one frame of
`pipeline.runtime.frame`; output `logits`, FP32 [N, classes]. Of a split there is also `coinfer-ID-edge` for clients without our coder: input `symbols`,
UINT8 [N, h, H, W], as edge.onnx takes them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto  # type: ignore[import-untyped]
from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped]
from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped]
from numpy.typing import NDArray

from pipeline.errors import FrameError

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
VERSION = "1"
FRAME, SYMBOLS, LOGITS = "frame", "symbols", "logits"
TIMES = ("decode_ms", "edge_ms")  # parameters of a response, those of its slowest element

# name, number, type; * after a type: repeated; a type with a capital: a message; "parameters": a map from names to InferParameter
_PARAMETERS = "parameters"
_MESSAGES = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": "name 1 string, version 2 string",
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 string*",
    "ModelMetadataRequest": "name 1 string, version 2 string",
    "ModelMetadataResponse": "name 1 string, versions 2 string*, platform 3 string, inputs 4 ModelMetadataResponse.TensorMetadata*, "
    "outputs 5 ModelMetadataResponse.TensorMetadata*",
    "ModelMetadataResponse.TensorMetadata": "name 1 string, datatype 2 string, shape 3 int64*",
    "InferParameter": "bool_param 1 bool, int64_param 2 int64, string_param 3 string, double_param 4 double, uint64_param 5 uint64",
    "InferTensorContents": "bool_contents 1 bool*, int_contents 2 int32*, int64_contents 3 int64*, uint_contents 4 uint32*, uint64_contents 5 uint64*, "
    "fp32_contents 6 float*, fp64_contents 7 double*, bytes_contents 8 bytes*",
    "ModelInferRequest": "model_name 1 string, model_version 2 string, id 3 string, parameters 4, inputs 5 ModelInferRequest.InferInputTensor*, "
    "outputs 6 ModelInferRequest.InferRequestedOutputTensor*, raw_input_contents 7 bytes*",
    "ModelInferRequest.InferInputTensor": "name 1 string, datatype 2 string, shape 3 int64*, parameters 4, contents 5 InferTensorContents",
    "ModelInferRequest.InferRequestedOutputTensor": "name 1 string, parameters 2",
    "ModelInferResponse": "model_name 1 string, model_version 2 string, id 3 string, parameters 4, outputs 5 ModelInferResponse.InferOutputTensor*, "
    "raw_output_contents 6 bytes*",
    "ModelInferResponse.InferOutputTensor": "name 1 string, datatype 2 string, shape 3 int64*, parameters 4, contents 5 InferTensorContents",
}


def _declare() -> FileDescriptorProto:
    file = FileDescriptorProto(name="coinfer/open_inference.proto", package=PACKAGE, syntax="proto3")
    messages: dict[str, DescriptorProto] = {}
    for name, fields in _MESSAGES.items():
        outer, _, inner = name.rpartition(".")
        message = messages[name] = messages[outer].nested_type.add(name=inner) if outer else file.message_type.add(name=name)
        for field in filter(None, fields.split(", ")):
            _add(message, f".{PACKAGE}.{name}", *field.split())
    choice = messages["InferParameter"]
    choice.oneof_decl.add(name="parameter_choice")
    for field in choice.field:
        field.oneof_index = 0
    return file


def _add(message: Any, where: str, name: str, number: str, kind: str = "") -> None:
    many = kind.endswith("*") or name == _PARAMETERS
    field = message.field.add(name=name, number=int(number), label=FieldDescriptorProto.LABEL_REPEATED if many else FieldDescriptorProto.LABEL_OPTIONAL)
    kind = kind.rstrip("*")
    if name == _PARAMETERS:
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        _add(entry, where, "key", "1", "string")
        _add(entry, where, "value", "2", "InferParameter")
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f"{where}.ParametersEntry"
    elif kind[0].isupper():
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
    else:
        field.type = getattr(FieldDescriptorProto, f"TYPE_{kind.upper()}")


_pool = DescriptorPool()  # private: a process may also hold somebody else's package `inference`
_pool.Add(_declare())


def message(name: str) -> Any:
    """The class of the message called `name`."""
    return GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


ModelInferRequest, ModelInferResponse = message("ModelInferRequest"), message("ModelInferResponse")


def path(method: str) -> str:
    """Of a method of the service in an HTTP/2 request."""
    return f"/{SERVICE}/{method}"


def model_name(bundle_id: bytes) -> str:
    """The model that takes frames of this bundle."""
    return f"coinfer-{bundle_id.hex()}"


def edge_model_name(bundle_id: bytes) -> str:
    """The model that takes symbols of this bundle."""
    return f"{model_name(bundle_id)}-edge"


_LENGTH = struct.Struct("<I")


def raw_elements(elements: Sequence[bytes]) -> bytes:
    """A BYTES tensor as raw contents hold it: each element after its length."""
    return b"".join(part for element in elements for part in (_LENGTH.pack(len(element)), element))


def elements(tensor: Any, raw: bytes | None) -> list[bytes]:
    """The elements of the BYTES tensor `tensor`, whose contents may be `raw`.

    Raises:
        FrameError: they do not fill its shape.
    """
    count, found = _count(tensor, "BYTES"), []
    if raw is None:
        found = list(tensor.contents.bytes_contents)
    else:
        place = 0
        while place + _LENGTH.size <= len(raw) and len(found) < count:
            begin = place + _LENGTH.size
            place = begin + _LENGTH.unpack_from(raw, place)[0]
            found.append(raw[begin:place])
        if place != len(raw):
            found = []
    if len(found) != count:
        raise FrameError(f"tensor {tensor.name[:80]} does not hold the {count} elements of its shape; in raw contents each comes after its length in 4 bytes.")
    return found


def uint8(tensor: Any, raw: bytes | None) -> NDArray[np.uint8]:
    """The numbers of the UINT8 tensor `tensor`, as many as its shape has, in one dimension.

    Raises:
        FrameError: its contents do not fill the shape.
    """
    numbers = _numbers(tensor, "UINT8", raw, "u1", tensor.contents.uint_contents)
    if numbers.size and numbers.max() > 255:
        raise FrameError(f"tensor {tensor.name[:80]} holds {numbers.max()}; a UINT8 is at most 255.")
    return numbers.astype(np.uint8, copy=False)


def float32(tensor: Any, raw: bytes | None) -> NDArray[np.float32]:
    """The numbers of the FP32 tensor `tensor`, as many as its shape has, in one dimension.

    Raises:
        FrameError: its contents do not fill the shape.
    """
    return _numbers(tensor, "FP32", raw, "<f4", tensor.contents.fp32_contents).astype(np.float32, copy=False)


def _numbers(tensor: Any, datatype: str, raw: bytes | None, of_raw: str, typed: Sequence[float]) -> NDArray[Any]:
    count = _count(tensor, datatype)
    found = len(typed) if raw is None else len(raw) / np.dtype(of_raw).itemsize
    if found != count:
        raise FrameError(f"tensor {tensor.name[:80]} holds {found:g} numbers where its shape has {count}; give all of them.")
    return np.array(typed) if raw is None else np.frombuffer(raw, of_raw)


def _count(tensor: Any, datatype: str) -> int:
    if tensor.datatype != datatype:
        raise FrameError(f"tensor {tensor.name[:80]} is {tensor.datatype[:20] or 'of no datatype'}, not {datatype}; look at the model's metadata.")
    return math.prod(tensor.shape)


def parameter(message: Any, name: str) -> float | None:
    """The number that `message` has as the parameter `name`, if it has one."""
    if name not in message.parameters:
        return None
    value = message.parameters[name]
    kind = value.WhichOneof("parameter_choice")
    return float(getattr(value, kind)) if kind in ("double_param", "int64_param", "uint64_param") else None
