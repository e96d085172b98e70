"""Images: where they come from, and in which order a seed sees them."""
