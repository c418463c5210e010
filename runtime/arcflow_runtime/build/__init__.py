"""Build TensorRT engines beside a bundle: shape profiles, the plan of what to build, the builder."""
