"""coinfer: device-edge co-inference as an MLOps pipeline."""
