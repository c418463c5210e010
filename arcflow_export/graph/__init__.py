"""Trace a module without weights to an ONNX graph, and the passes that tidy the graph."""
