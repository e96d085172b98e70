"""One run: its config, the objects that it is built from, and its training."""
