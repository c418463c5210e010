"""Trace a PyTorch module to an ONNX graph without loading its weights, and clean up the graph."""
