"""The drift gate: how far a quantised bundle's images moved from its original's, against a policy's thresholds."""
