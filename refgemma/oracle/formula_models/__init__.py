"""Tiny models whose weights are a formula, to check a port without a download."""
