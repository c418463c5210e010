"""What a pipeline needs of its device's memory: bundle, image size and mode -> bytes, before any engine is opened."""
