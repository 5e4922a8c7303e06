"""coinfer: device-edge co-inference as an MLOps pipeline."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on ONNX Runtime tells its makers of every session, under a device id kept in ~/.cache
