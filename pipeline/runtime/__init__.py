"""What runs on a device and on an edge: numpy, onnxruntime and Pillow, never torch."""
