"""The model families: split diffusers' and transformers' models into parts, with modules that trace well."""
