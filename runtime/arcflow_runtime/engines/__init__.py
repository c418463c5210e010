"""What runs one part of a bundle: the interfaces, ONNX Runtime on the CPU, and the store of engines that were built."""
