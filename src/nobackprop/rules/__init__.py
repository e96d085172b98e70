"""The learning rules, one file each."""
