"""TensorRT and TensorRT-RTX: a bundle's parts -> engines beside it, each with a record of all that it depends on."""
