"""ONNX graphs of any length, for ONNX Runtime and its relatives."""
