"""Serve bundles over HTTP with OpenAI's images API: `arcflow serve BUNDLE`."""
