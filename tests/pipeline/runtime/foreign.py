"""A client and a server of the Open Inference Protocol that share no code with ours: `tritonclient`, in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "tritonclient[grpc]==2.73.0"

CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc as v2
from google.protobuf.json_format import MessageToDict

address, model, edge_model, frames, symbols = json.loads(sys.stdin.read())
client = v2.InferenceServerClient(address)


def infer(name, model, array, datatype):
    tensor = v2.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    answer = client.infer(model, [tensor], request_id="7", outputs=[v2.InferRequestedOutput("logits")])
    response = answer.get_response()
    times = {name: value.double_param for name, value in response.parameters.items()}
    return {"logits": answer.as_numpy("logits").tolist(), "id": response.id, "version": response.model_version, "times": times}


def refused(call):
    try:
        call()
    except v2.InferenceServerException as error:
        return [error.status(), error.message()]


batch = np.array([[bytes.fromhex(frame)] for frame in frames], np.object_)
print(json.dumps({
    "live": client.is_server_live(), "ready": client.is_server_ready(), "server": client.get_server_metadata().name,
    "models": [client.is_model_ready(model), client.is_model_ready(edge_model), client.is_model_ready("resnet"), client.is_model_ready(model, "2")],
    "metadata": [client.get_model_metadata(name, as_json=True) for name in (model, edge_model)],
    "frames": infer("frame", model, batch, "BYTES"),
    "symbols": infer("symbols", edge_model, np.array(symbols, np.uint8), "UINT8"),
    "unknown": refused(lambda: infer("frame", "resnet", batch, "BYTES")),
    "damaged": refused(lambda: infer("frame", model, np.array([[batch[0, 0][:-1] + bytes([batch[0, 0][-1] ^ 1])]], np.object_), "BYTES")),
}))
"""

SERVER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import grpc, numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor

model, answers = json.loads(sys.stdin.readline())  # frame -> logits


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelInfer(self, request, context):
        way = dict(context.invocation_metadata())["coinfer-device"]
        (tensor,) = request.inputs
        frame = deserialize_bytes_tensor(request.raw_input_contents[0]).reshape(tuple(tensor.shape))[0, 0]
        if (request.model_name, tensor.name, tensor.datatype, list(tensor.shape)) != (model, "frame", "BYTES", [1, 1]) or frame.hex() not in answers:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not as it should be: {request}")
        logits = np.array(answers[frame.hex()], np.float32)
        response = service_pb2.ModelInferResponse(model_name=model, model_version="3")
        other = response.outputs.add(name="probabilities", datatype="FP32", shape=[1, 1])
        output = response.outputs.add(name="logits", datatype="FP32", shape=[1, len(logits)])
        if way == "typed":
            output.contents.fp32_contents.extend(logits)
            other.contents.fp32_contents.append(1)
        elif way == "raw":
            response.raw_output_contents.extend([np.float32(1).tobytes(), logits.tobytes()])
        elif way == "nameless":
            output.name = "scores"
        elif way == "half":
            output.datatype = "FP16"
        elif way == "short":
            response.raw_output_contents.extend([b"1234", b"123456"])
        elif way == "few":
            response.raw_output_contents.append(logits.tobytes())
        elif way == "late":
            response.raw_output_contents.extend([b"1234", logits.tobytes()])
            response.parameters["decode_ms"].double_param = 1e300
        else:
            context.abort(getattr(grpc.StatusCode, way), f"so {way} it is")
        return response


server = grpc.server(ThreadPoolExecutor(2))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.readline()
"""

DESCRIPTOR = "import sys; from tritonclient.grpc import service_pb2; sys.stdout.buffer.write(service_pb2.DESCRIPTOR.serialized_pb)"


class Foreign:
    """Runs programs where `tritonclient` is installed and coinfer is not."""

    def __init__(self, folder: Path) -> None:
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        assert uv is not None, "install uv, as `make` does"
        self.environment = {**os.environ, "VIRTUAL_ENV": str(folder)}
        self.environment.pop("PYTHONPATH", None)
        for command in (["venv", "--python", sys.executable, str(folder)], ["pip", "install", VERSION]):
            subprocess.run([uv, command[0], "--quiet", *command[1:]], env=self.environment, check=True)
        self.python = str(folder / "bin" / "python")

    def popen(self, code: str) -> subprocess.Popen[str]:
        return subprocess.Popen([self.python, "-c", code], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def output(self, code: str, **options) -> bytes:
        return subprocess.run([self.python, "-c", code], env=self.environment, stdout=subprocess.PIPE, check=True, timeout=60, **options).stdout

    def ask(self, *given):
        """What CLIENT finds at an edge."""
        return json.loads(self.output(CLIENT, input=json.dumps(given).encode()))
