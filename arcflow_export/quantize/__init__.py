"""Put the linears that a policy names in FP8: bundle, scales -> bundle."""
