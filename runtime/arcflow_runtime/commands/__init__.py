"""Subcommands of `arcflow` that need only the runtime: generate, build, push, inspect, lora, bench, profile."""
