"""What a run leaves: its record, where it was made, and many records gathered."""
