"""The exporter's files on disk: scales, policies with their thresholds, prompt sets."""
