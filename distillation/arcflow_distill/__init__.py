"""Distillation: train a two-step student of a FLUX or Qwen-Image teacher; and the small shapes model."""
