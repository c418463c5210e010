"""ArcFlow distillation: a FLUX or Qwen-Image teacher -> a two-step student, and the small model that shows it."""
