"""Run a bundle's graphs on a CPU in their own precision, in pieces if they do not fit in memory; used for checking."""
