"""The messages of the Open Inference Protocol, against the published ones, and the tensors in them."""

import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import FrameError
from pipeline.runtime import oip
from tests.pipeline.runtime.foreign import DESCRIPTOR

TENSOR = oip.message("ModelInferRequest.InferInputTensor")


def fields(messages, prefix: str = "") -> dict[str, list[tuple]]:
    found = {}
    for message in messages:
        found[prefix + message.name] = sorted(
            (field.number, field.name, field.label, field.type, field.type_name, field.HasField("oneof_index"), message.options.map_entry)
            for field in message.field
        )
        found |= fields(message.nested_type, f"{prefix}{message.name}.")
    return found


def test_the_messages_are_the_published_ones(foreign):
    published = FileDescriptorProto.FromString(foreign.output(DESCRIPTOR))
    ours = FileDescriptorProto()
    oip.ModelInferRequest.DESCRIPTOR.file.CopyToProto(ours)
    theirs = fields(published.message_type)
    for name, found in fields(ours.message_type).items():
        assert found == theirs[name], name
    (service,) = published.service
    assert f"{published.package}.{service.name}" == oip.SERVICE
    types = {method.name: (method.input_type, method.output_type) for method in service.method}
    for method in oip.METHODS:
        assert types[method] == (f".{oip.PACKAGE}.{method}Request", f".{oip.PACKAGE}.{method}Response")
        assert oip.message(f"{method}Request")
        assert oip.message(f"{method}Response")


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_elements_come_back_raw_and_typed(elements):
    for shape in ([len(elements)], [len(elements), 1]):
        tensor = TENSOR(name="frame", datatype="BYTES", shape=shape)
        assert oip.elements(tensor, oip.raw_elements(elements)) == elements
        tensor.contents.bytes_contents.extend(elements)
        assert oip.elements(tensor, None) == elements


@given(st.binary(max_size=60), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=70), st.sampled_from(["BYTES", "UINT8", "FP32", "", "é"]))
def test_what_fills_no_tensor_is_a_frame_error(raw, shape, datatype):
    tensor = TENSOR(name="frame", datatype=datatype, shape=shape)
    for read in (oip.elements, oip.uint8, oip.float32):
        for contents in (raw, None):
            try:
                found = read(tensor, contents)
            except FrameError:
                continue
            assert len(found) == np.prod(np.array(shape, object))


def test_numbers_are_raw_or_typed():
    tensor = TENSOR(name="symbols", datatype="UINT8", shape=[1, 3])
    assert oip.uint8(tensor, bytes([1, 2, 255])).tolist() == [1, 2, 255]
    tensor.contents.uint_contents.extend([1, 2, 255])
    assert oip.uint8(tensor, None).tolist() == [1, 2, 255]
    tensor.contents.uint_contents[1] = 256
    with pytest.raises(FrameError, match="holds 256"):
        oip.uint8(tensor, None)
    tensor = TENSOR(name="logits", datatype="FP32", shape=[2])
    assert oip.float32(tensor, np.array([0.5, -2], "<f4").tobytes()).tolist() == [0.5, -2]
    tensor.contents.fp32_contents.extend([0.5, -2])
    assert oip.float32(tensor, None).tolist() == [0.5, -2]
    with pytest.raises(FrameError, match=r"holds 2\.25 numbers where its shape has 2"):
        oip.float32(tensor, bytes(9))


def test_a_parameter_is_a_number_or_none():
    answer = oip.ModelInferResponse()
    for name, kind, value in [
        ("a", "double_param", 0.5),
        ("b", "int64_param", 2),
        ("c", "uint64_param", 3),
        ("d", "string_param", "4"),
        ("e", "bool_param", True),
    ]:
        setattr(answer.parameters[name], kind, value)
    assert [oip.parameter(answer, name) for name in "abcdef"] == [0.5, 2, 3, None, None, None]
