"""One training step of ours beside one of others, with the same weights on the same batch; see __main__.py."""
