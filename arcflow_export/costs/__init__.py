"""Estimate the time, memory and disk of a stage before it starts, from counts of its work and the machine's speed."""
