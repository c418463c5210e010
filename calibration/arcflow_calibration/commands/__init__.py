"""The `arcflow calibrate` command."""
