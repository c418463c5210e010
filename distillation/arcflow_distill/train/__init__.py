"""`arcflow distill`: train a student against its teacher and write it as an adapter."""
