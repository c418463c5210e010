"""Subcommands of `arcflow` that need only the runtime: generate, build, inspect, bench, profile."""
