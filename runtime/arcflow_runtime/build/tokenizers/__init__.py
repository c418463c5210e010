"""Build a bundle's tokenizers as OpenVINO models, for the C++ library, which has no tokenizers library."""
