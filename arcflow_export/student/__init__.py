"""A student in torch: open and check its files, run it as the reference does, with weights on disk if necessary."""
