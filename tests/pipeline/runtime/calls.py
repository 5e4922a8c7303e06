"""Requests of the Open Inference Protocol, as a test makes them."""

import grpc
import numpy as np

from pipeline.runtime import oip
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.hello import Hello
from tests.pipeline.runtime.serving import logits

CODES = grpc.StatusCode


class Client:
    """Calls methods with messages; `infer` may be asked for a future."""

    def __init__(self, port: int, keys=None, hello=Hello()) -> None:  # noqa: B008
        address = f"127.0.0.1:{port}"
        key, certificate, authority = keys.pems() if keys else (None, None, None)
        self.channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate)) if keys else grpc.insecure_channel(address)
        self.metadata = hello.to_metadata()

    def method(self, name: str):
        return self.channel.unary_unary(oip.path(name), lambda message: message.SerializeToString(), oip.message(f"{name}Response").FromString)

    def call(self, method: str, **fields):
        return self.method(method)(oip.message(f"{method}Request")(**fields), timeout=20, metadata=self.metadata)

    def infer(self, request, timeout_s: float = 20):
        return self.method("ModelInfer").future(request, timeout=timeout_s, metadata=self.metadata)


def request_for(bundle, *frames: bytes, typed=False, **changes):
    tensor = {"name": "frame", "datatype": "BYTES", "shape": [len(frames), 1]} | ({"contents": {"bytes_contents": frames}} if typed else {})
    fields = {"model_name": oip.model_name(bundle.bundle_id), "inputs": [tensor], "raw_input_contents": [] if typed else [oip.raw_elements(frames)]}
    return oip.ModelInferRequest(**fields | changes)


def symbols_for(bundle, symbols: np.ndarray):
    tensor = {"name": "symbols", "datatype": "UINT8", "shape": symbols.shape}
    return oip.ModelInferRequest(model_name=oip.edge_model_name(bundle.bundle_id), inputs=[tensor], raw_input_contents=[symbols.astype(np.uint8).tobytes()])


def found(answer) -> np.ndarray:
    (output,) = answer.outputs
    values = np.frombuffer(answer.raw_output_contents[0], "<f4") if answer.raw_output_contents else np.array(output.contents.fp32_contents, np.float32)
    return values.reshape(tuple(output.shape))


def expected(bundle, frames) -> np.ndarray:
    return np.array([logits(EdgeHalf(bundle).handle(frame)[0]) for frame in frames])


def refused(future) -> tuple[grpc.StatusCode, str]:
    return future.code(), future.details()
