"""Prompt to image: check the request, tokenise, encode, condition, denoise, decode."""
