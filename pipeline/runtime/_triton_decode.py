"""The step before edge.onnx in a Triton server: frames in, what edge.onnx takes out. `coinfer bundle triton` copies this file as a model.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # only within Triton


class TritonPythonModel:
    """What Triton's Python backend starts."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the manifest and the codec tables beside this file.

        Raises:
            TritonModelException: coinfer is not installed here, or cannot read them; Triton shows why and does not load the model.
        """
        try:
            from pipeline.errors import CoinferError
            from pipeline.runtime.bundle import Bundle
            from pipeline.runtime.edge import FrameOpener
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"coinfer, or this version of it, is not installed in Triton's Python ({error}); run `pip install coinfer` there, as docs/scale-out.md shows."
            ) from error
        self._refused = CoinferError
        try:
            self._opener = FrameOpener(Bundle.without_models(Path(__file__).parent))
        except CoinferError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._output = json.loads(args["model_config"])["output"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request, in their order."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:
        frames = pb_utils.get_input_tensor_by_name(request, "frame").as_numpy()
        try:
            opened = np.concatenate([self._opener.open(frame) for frame in frames.ravel()])
        except self._refused as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(self._output, self._opener.tensor(opened))])
