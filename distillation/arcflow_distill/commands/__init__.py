"""Command-line commands of `arcflow_distill`."""
