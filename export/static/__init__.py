"""ONNX graphs of fixed shapes, for the compilers of NPUs."""
