"""All stages in order, from a student file to engines: what is done, what is left, how it went."""
