"""Build a bundle's tokenizers as OpenVINO models, for readers without the tokenizers library."""
