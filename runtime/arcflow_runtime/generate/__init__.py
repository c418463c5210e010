"""From prompt to image: check the request, tokenise, encode, condition, denoise, decode; `pipeline.py` calls them."""
