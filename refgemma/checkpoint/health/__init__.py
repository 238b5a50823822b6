"""Finds what is wrong with a model folder, without loading it."""
