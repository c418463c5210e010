"""`arcflow eval`: score students and their teacher on captions of shapes."""
