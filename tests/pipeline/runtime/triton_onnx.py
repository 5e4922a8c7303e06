"""Stands in for Triton's ONNX Runtime backend, which no registry has: a model.py that runs the ONNX file as config.pbtxt describes it, or refuses to."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(str(Path(__file__).with_name("edge.onnx")), options)
        config = json.loads(args["model_config"])
        types = {"TYPE_UINT8": "tensor(uint8)", "TYPE_FP32": "tensor(float)"}
        for ends, described in ((self.session.get_inputs(), config["input"]), (self.session.get_outputs(), config["output"])):
            found = [(end.name, end.type, list(end.shape[1:])) for end in ends]
            if found != [(end["name"], types[end["data_type"]], [int(size) for size in end["dims"]]) for end in described]:
                raise pb_utils.TritonModelException(f"edge.onnx has {found}, config.pbtxt {described}")
        self.input, self.output = config["input"][0]["name"], config["output"][0]["name"]

    def execute(self, requests):
        arrays = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        logits = self.session.run([self.output], {self.input: np.concatenate(arrays)})[0]
        parts = np.split(logits, np.cumsum([len(array) for array in arrays])[:-1])
        return [pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self.output, part)]) for part in parts]
