"""Compare a bundle with the student in torch, part by part and end to end."""
