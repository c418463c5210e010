"""What images are judged by: scenes of shapes, the judge that reads them, statistics."""
