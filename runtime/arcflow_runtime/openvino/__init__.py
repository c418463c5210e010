"""Tokenizers of a bundle as OpenVINO models, for readers without the tokenizers library; rules O1... in docs/bundle.md."""
