"""Graph-ready torch modules of every part of a bundle, built on the meta device."""
