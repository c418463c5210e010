"""The commands `arcflow distill`, `arcflow eval` and `arcflow train-shapes`."""
