"""Trace a module without weights to an ONNX graph, and clean up the graph."""
