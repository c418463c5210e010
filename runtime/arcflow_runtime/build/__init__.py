"""Build engines and tokenizers from a bundle, for `arcflow build`: shape profiles, the list of engines, the builder."""
