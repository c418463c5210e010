"""The procedural set of captioned shapes, and the small FLUX teacher trained on it."""
