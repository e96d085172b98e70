"""Papers' experiments: their grids, tables, claims and figures, and searches of settings."""
