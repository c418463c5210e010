"""Everything on disk: the manifest and its rules, records of engines and tokenizers, locks, hashes, atomic renames."""
