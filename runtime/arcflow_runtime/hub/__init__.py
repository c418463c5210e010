"""Bundles on the Hugging Face hub: find and download them, and push them there."""
