"""Test images of shapes: their renderer and captions, the judge that reads images back, and statistics.

The drift gate and the evaluation of students use them.
"""
