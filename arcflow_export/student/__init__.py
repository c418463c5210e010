"""A student in torch: open and check its files, run it as the reference does, read weights from disk as they are used."""
