"""Scores of teachers and students on captioned shapes."""
