"""Engines, each of which runs one part of a bundle: interfaces, ONNX Runtime on the CPU, the store of built engines."""
