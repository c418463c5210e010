"""`arcflow train-shapes`: train the small shapes model (VAE, FLUX teacher, judge, students) from nothing."""
