"""Compare bundles: the same prompts and noise through each, with times and errors."""
