"""The drift gate: measure how far a quantised bundle differs from its original, and apply a policy's thresholds."""
