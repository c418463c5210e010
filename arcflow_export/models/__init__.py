"""The model families: how each is split in parts, and modules that trace well."""
