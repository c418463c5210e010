"""`arcflow doctor`: check a machine for running bundles, or for a compile job. Nothing here needs an extra."""
