"""Run a bundle's graphs on a CPU in their own precision, block by block where they do not fit in memory."""
