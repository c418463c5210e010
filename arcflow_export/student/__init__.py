"""A student in torch: which files make it up, the reference pipeline, weights read from disk as they are used."""
