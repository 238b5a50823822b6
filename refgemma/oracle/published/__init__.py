"""Figures that others have published for Gemma models, and how a model compares with them."""
