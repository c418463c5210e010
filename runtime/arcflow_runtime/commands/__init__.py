"""The commands that need the runtime alone."""
