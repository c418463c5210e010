"""The commands that make and verify bundles."""
