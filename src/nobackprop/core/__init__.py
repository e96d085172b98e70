"""Nets, learning rules' base, losses, initial weights, optimizers: torch and the standard library alone."""
