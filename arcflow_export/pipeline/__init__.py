"""`arcflow compile`: run all stages in order, from a student file to engines, and skip those that are done."""
