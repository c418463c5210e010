"""A bundle's tokenizers as OpenVINO models, for readers without the tokenizers library (O1... in docs/bundle.md)."""
